"""Compress transformer language models, and know exactly what you got."""
__version__ = "0.1.0"

import sys
from importlib import import_module
from importlib.machinery import PathFinder

_PUBLIC = { # Where each name lives; its module is imported when the name is first used
    "distillation.cascade": ["ProgressiveDistillation"],
    "distillation.students": ["student_of"],
    "distillation.trainer": ["DistillationTrainer"],
    "interchange": ["export"],
    "ledger": ["Ledger", "Row", "held_out", "measure"],
    "lowrank.embedding": ["factorize_embedding"],
    "lowrank.kv": ["latent_kv"],
    "lowrank.linear": ["choose_ranks", "factorize", "rank_sensitivity"],
    "lowrank.tensors": ["factorize_tensors"],
    "lowrank.vocabulary": ["trim_vocabulary"],
    "pai.dendrites": ["finalize", "perforate"],
    "pai.tracker": ["DendriteSettings", "fit_with_dendrites"],
    "pruning.bregman": ["bregman", "outlier_shares"],
    "pruning.calibrated": ["choose_sparsity", "pruning_sensitivity", "sparsegpt", "wanda"],
    "pruning.experts": ["prune_experts", "track_usage"],
    "pruning.magnitude": ["MagnitudePruner"],
    "pruning.removal": ["ProgressivePruningScheduler"],
    "pruning.schedule": ["GradualPruning", "IterativePruning", "KeepZeros"],
    "pruning.structured": ["apply_compression_ratio", "drop_layers", "prune_channels", "prune_heads", "prune_hidden"],
    "quant.experts": ["quantize_experts"],
    "quant.kv": ["QuantizedKVCache"],
    "quant.mixed": ["mixed_precision", "sensitivity"],
    "quant.ptq": ["gptq", "rtn"],
    "quant.qat": ["calibrate", "convert", "prepare_qat"],
    "quant.rounding": ["hqq", "learn_rounding"],
    "quant.scaling": ["awq", "smoothquant"],
    "recipe": ["Recipe"],
    "recursive.layer": ["RecursiveCompression"],
    "resnetbk.model": ["ResNetBKConfig", "ResNetBKForCausalLM"],
    "resnetbk.pipeline": ["CompressionPipeline"],
    "resnetbk.quantized": ["quantize_core"],
    "stages": ["stage"],
    "store": ["load", "save"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]

def __getattr__(name):
    if name in _HOME: value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif PathFinder.find_spec(f"{__name__}.{name}", __path__): value = import_module(f"{__name__}.{name}")
    else: raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return value

def __dir__(): return [*globals(), *_HOME]

def import_all():
    "Import every public module, and with it each class that a `compresslab.json` may name."
    for module in _PUBLIC: import_module(f"{__name__}.{module}")

class _Registration(PathFinder):
    "Registers our quantizer and our model classes as soon as transformers has imported what they register with."
    with_, depth = ("transformers.modeling_utils", "transformers.models.auto.configuration_auto"), 0

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name.startswith(("transformers.", f"{__name__}.")) else None
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"): return None
        run = spec.loader.exec_module
        def exec_module(module):
            cls.depth += 1                                    # within an import the modules around it are half made
            try: run(module)
            finally: cls.depth -= 1
            cls.register()
        spec.loader.exec_module = exec_module
        return spec

    @classmethod
    def register(cls):
        if cls.depth or cls not in sys.meta_path or not any(m in sys.modules for m in cls.with_): return
        sys.meta_path.remove(cls)
        for module in ("store", "resnetbk.model", "distillation.patches", "pai.dendrites"): import_module(f"{__name__}.{module}")

sys.meta_path.insert(0, _Registration)
_Registration.register()
