"""Clusters of tokens, through whole models and on real text: no leak, one stream, and what merging is worth."""
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compresslab.blocks import pack

from compresslab.data import documents
from compresslab.recursive.cluster import Arrivals, StreamingClusters, cluster, rows
from compresslab.recursive.leaders import Clustering, ThresholdModulator, directions, dots, first_leaders, layer_schedule, surprisal
from compresslab.store import find_tokenizer, load

EVERYTHING = Clustering(percentile=.4, floor=.2, window=48, position_weight=.2, attention_weight=.3, shield=.3)
NAMES = [f.name for f in fields(Arrivals)]


def families():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    llama = dict(vocab_size=64, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=52, num_key_value_heads=2, head_dim=10, max_position_embeddings=64)
    return dict(tied=lambda: LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)), untied=lambda: LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=False)),
                gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=40, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)),
                t5=lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=40, d_ff=52, num_layers=2, num_heads=4, d_kv=10, decoder_start_token_id=0)))


@torch.no_grad()
def layers(model, ids, mask=None):
    """States, attention and surprisal of each layer of a decoder."""
    if model.config.is_encoder_decoder:
        out = model(input_ids=torch.arange(1, 21)[None].repeat(len(ids), 1), decoder_input_ids=ids, decoder_attention_mask=mask, output_hidden_states=True, output_attentions=True, use_cache=False)
        states, attentions = out.decoder_hidden_states[1:], out.decoder_attentions
    else:
        positions = {} if mask is None else dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        out = model(input_ids=ids, attention_mask=mask, **positions, output_hidden_states=True, output_attentions=True, use_cache=False)
        states, attentions = out.hidden_states[1:], out.attentions
    return [(h, dict(attention=a, surprisal=surprisal(out.logits, ids, mask))) for h, a in zip(states, attentions)]


@pytest.mark.parametrize("family", ["tied", "untied", "gpt2", "t5"])
def test_a_changed_token_changes_nothing_before_it(family):
    torch.manual_seed(0)
    model = families()[family]().eval(); model.set_attn_implementation("eager")
    ids, modulator = torch.randint(1, 64, (2, 60)), ThresholdModulator(40)
    nn.init.normal_(modulator.weight)
    for j in (5, 47):
        other = ids.clone(); other[:, j] = (ids[:, j] % 62) + 1
        for (x, more), (y, much) in zip(layers(model, ids), layers(model, other)):
            one, two = (cluster(h, EVERYTHING, modulator=modulator, **k) for h, k in ((x, more), (y, much)))
            assert not torch.equal(x[:, j], y[:, j]) and one.joined.any()
            for n in NAMES: torch.testing.assert_close(getattr(one, n)[:, :j], getattr(two, n)[:, :j], atol=1e-5, rtol=1e-5)
            assert torch.equal(one.visible()[:, :j, :j], two.visible()[:, :j, :j]) and not one.visible().triu(1).any()


def test_left_padding_is_not_there():
    torch.manual_seed(0)
    model = families()["tied"]().eval(); model.set_attn_implementation("eager")
    ids = torch.randint(1, 64, (1, 40)); padded, mask = F.pad(ids, (9, 0)), F.pad(torch.ones_like(ids), (9, 0))
    for (x, more), (y, much) in zip(layers(model, ids), layers(model, padded, mask)):
        one, two = cluster(x, EVERYTHING, **more), cluster(y, EVERYTHING, mask, **much)
        assert torch.equal(one.cluster, two.cluster[:, 9:]) and torch.equal(one.leader + 9, two.leader[:, 9:])
        torch.testing.assert_close(one.thresholds, two.thresholds[:, 9:], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def real(shared):
    """States, attention and surprisal of stories260k on a story, and of no other length than its context."""
    folder = shared("models/stories260k")
    model, tokenizer = load(folder).float().eval(), find_tokenizer(str(folder))
    model.set_attn_implementation("eager")
    ids = pack(documents(str(shared("tinystories")), "valid"), tokenizer, 256, max_tokens=256*8).input_ids[:4]
    return layers(model, ids)


@pytest.mark.parametrize("config", [Clustering(window=32), EVERYTHING, replace(EVERYTHING, percentile=None, similarity_threshold=.8, window=300)], ids=["plain", "everything", "fixed"])
def test_any_cut_gives_the_same_clusters(real, config):
    g = torch.Generator().manual_seed(0)
    for h, more in real:
        more = {k: v for k, v in more.items() if config.shield}
        whole, N = cluster(h, config, **more), h.shape[1]
        for sizes in ([1]*N, [N], torch.randint(1, 40, (40,), generator=g).tolist()):
            stream, at, out = StreamingClusters(config), 0, []
            for n in sizes:
                n = min(n, N - at)
                if not n: break
                piece = {k: v[:, :, at:at + n, :at + n] if k == "attention" else v[:, at:at + n] for k, v in more.items()}
                out.append(stream.push(h[:, at:at + n], **piece)); at += n
            assert at == N
            for n in NAMES: assert torch.equal(torch.cat([getattr(o, n) for o in out], 1), getattr(whole, n)), n


def test_states_of_every_prefix(real):
    h = real[2][0]
    whole = cluster(h, Clustering(window=64))
    for t in range(0, h.shape[1], 17):
        prefix = cluster(h[:, :t + 1], Clustering(window=64))
        assert torch.equal(whole.reconstruct(t), prefix.reconstruct()) and torch.equal(whole.visible()[:, t, :t + 1], prefix.visible()[:, -1])
        assert (rows(whole.counts, whole.current(t))*(whole.current(t) >= 0)).sum() == len(h)*(t + 1)


def test_clusters_tell_more_than_a_window_and_the_percentile_sets_the_ratio(real):
    for h, _ in real:
        ratios = []
        for q in (.3, .5, .7):
            k = cluster(h, Clustering(percentile=q, floor=0.)); ratios.append(k.ratio)
            assert .6/q < k.ratio < 1.4/q
            keep = int((k.mask & ~k.joined).sum(1).float().mean())
            window = torch.cat((h[:, :-keep].mean(1, keepdim=True).expand(-1, h.shape[1] - keep, -1), h[:, -keep:]), 1)
            assert (k.reconstruct() - h).square().sum() < .6*(window - h).square().sum()
        assert ratios[0] > ratios[1] > ratios[2]


def test_a_schedule_compresses_late_layers_harder(real):
    ratios = [cluster(h, c).ratio for (h, _), c in zip(real, layer_schedule(Clustering(floor=0.), len(real), .9, .2))]
    assert ratios[0] < 1.3 and ratios[-1] > 1.5 and ratios == sorted(ratios)


def test_long_text_needs_no_square(pylm):
    """8192 tokens: memory grows with N times the window, decisions are those of the stream, and rounds are few."""
    torch.manual_seed(0)
    themes = torch.randn(1, 300, 32)
    h = rows(themes, torch.randint(0, 300, (1, 8192))) + .5*torch.randn(1, 8192, 32)
    whole = cluster(h); stream = StreamingClusters()
    out = [stream.push(h[:, a:a + 1000]) for a in range(0, 8192, 1000)]
    assert torch.equal(torch.cat([o.cluster for o in out], 1), whole.cluster) and whole.ratio > 1.2
    span = torch.arange(8192) - whole.leader
    assert span.max() <= 256 and span.min() == 0


def test_half_precision_states(real):
    h = real[1][0].bfloat16()
    k, f = cluster(h), cluster(h.float())
    assert torch.equal(k.cluster, f.cluster) and k.centroids.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(cluster(h.float()).cluster, f.cluster)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_decides_the_same(tf32):
    torch.manual_seed(0)
    h = rows(torch.randn(4, 60, 128), torch.randint(0, 60, (4, 1024))) + .6*torch.randn(4, 1024, 128)
    a = torch.rand(4, 2, 1024, 1024).pow(4).tril(); a /= a.sum(-1, keepdim=True)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        for config, more in ((Clustering(), {}), (EVERYTHING, dict(attention=a, surprisal=torch.rand(4, 1024)))):
            one, two = cluster(h, config, **more), cluster(h.cuda(), config, **{k: v.cuda() for k, v in more.items()})
            assert torch.equal(dots(directions(h), directions(h)), dots(directions(h.cuda()), directions(h.cuda())).cpu())
            assert torch.equal(one.leader, two.leader.cpu()) and one.ratio > 1.2
            torch.testing.assert_close(one.centroids, two.centroids.cpu(), atol=1e-6, rtol=1e-6)
    finally: torch.backends.cuda.matmul.allow_tf32 = before


def test_leaders_of_a_path_and_of_a_crowd():
    n = 50
    assert first_leaders(torch.ones(1, n, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool))[0].tolist() == [True] + [False]*(n - 1)
    assert first_leaders(torch.diag(torch.ones(n - 1), -1).bool()[None], torch.zeros(1, n, dtype=torch.bool))[0].tolist() == [i % 2 == 0 for i in range(n)]
