"""The peers that ``replace_quantizers`` knows, asked in this order."""

from .diffusers import PEER as DIFFUSERS
from .peer import Peer
from .taming import PEER as TAMING
from .vector_quantize_pytorch import PEER as VECTOR_QUANTIZE_PYTORCH

PEERS: tuple[Peer, ...] = (VECTOR_QUANTIZE_PYTORCH, DIFFUSERS, TAMING)
