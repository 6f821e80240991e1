"""Compress transformer language models, and know exactly what you got."""
__version__ = "0.1.0"

from compresslab.ledger import Ledger, Row, held_out, measure
from compresslab.quant.ptq import gptq, rtn
from compresslab.store import load, save
