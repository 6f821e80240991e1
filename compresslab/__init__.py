"""Compress transformer language models, and know exactly what you got."""
__version__ = "0.1.0"

from compresslab.distillation.cascade import ProgressiveDistillation
from compresslab.distillation.students import student_of
from compresslab.distillation.trainer import DistillationTrainer
from compresslab.ledger import Ledger, Row, held_out, measure
from compresslab.lowrank.embedding import factorize_embedding
from compresslab.lowrank.kv import latent_kv
from compresslab.lowrank.linear import choose_ranks, factorize, rank_sensitivity
from compresslab.lowrank.tensors import factorize_tensors
from compresslab.lowrank.vocabulary import trim_vocabulary
from compresslab.pruning.calibrated import choose_sparsity, pruning_sensitivity, sparsegpt, wanda
from compresslab.pruning.experts import ProgressivePruningScheduler, prune_experts, track_usage
from compresslab.pruning.magnitude import MagnitudePruner
from compresslab.pruning.schedule import GradualPruning, IterativePruning, KeepZeros
from compresslab.pruning.structured import apply_compression_ratio, drop_layers, prune_channels, prune_heads, prune_hidden
from compresslab.quant.experts import quantize_experts
from compresslab.quant.kv import QuantizedKVCache
from compresslab.quant.mixed import mixed_precision, sensitivity
from compresslab.quant.ptq import gptq, rtn
from compresslab.quant.qat import calibrate, convert, prepare_qat
from compresslab.quant.rounding import hqq, learn_rounding
from compresslab.quant.scaling import awq, smoothquant
from compresslab.resnetbk.model import ResNetBKConfig, ResNetBKForCausalLM
from compresslab.resnetbk.pipeline import CompressionPipeline
from compresslab.resnetbk.quantized import quantize_core
from compresslab.store import export, load, save
