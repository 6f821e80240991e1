"""The loaders on real files, against what their publishers say is in them."""
from compresslab.data import documents, scitldr, squad


def test_tinystories(shared):
    train = documents(str(shared("tinystories")), "train")
    assert len(train) == 2218
    assert not any("\n\n" in t for t in train["text"])


def test_wikitext_articles(shared):
    raw = documents(str(shared("wikitext-2/wiki.valid.raw")))
    assert len(raw) == 60                                   # WikiText-2's validation part has 60 articles
    assert all(t.lstrip().startswith("= ") for t in raw["text"])


def test_wikitext_folder_prefers_the_raw_text(shared):
    assert documents(str(shared("wikitext-2")), "valid")["text"] == documents(str(shared("wikitext-2/wiki.valid.raw")))["text"]


def test_books_are_cut_without_loss(shared):
    folder = shared("gutenberg")
    parts = {s: documents(str(folder), s)["text"] for s in ("train", "valid", "test", "all")}
    assert sum(map(len, parts["train"])) + sum(map(len, parts["valid"])) + sum(map(len, parts["test"])) == sum(map(len, parts["all"]))
    assert not {*parts["train"]} & {*parts["valid"]}


def test_squad(shared):
    train, dev = squad(str(shared("squad")), "train"), squad(str(shared("squad/dev-v1.1.json")))
    assert len(train) == 87_599 and len({*train["title"]}) == 442 and len({*train["context"]}) <= 18_896
    assert len(dev) == 8_123
    for row in dev.select(range(0, len(dev), 50)):
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"]): assert row["context"][start:start + len(text)] == text


def test_scitldr(shared):
    train, dev = scitldr(str(shared("scitldr")), "train"), scitldr(str(shared("scitldr")), "valid")
    assert (len(train), len(dev)) == (1992, 619)
    short = [sum(len(r["rouge_scores"]) < len(r["source"]) for r in part) for part in (train, dev)]
    assert short == [63, 19]                                # as upstream
