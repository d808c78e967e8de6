"""Encoders and decoders: plain modules that know nothing of dynamics, samplers or losses."""

from dc_ssdae.networks.dc_encoder import DCEncoder
from dc_ssdae.networks.diffusers_encoder import DiffusersEncoder
from dc_ssdae.networks.kl_encoder import KLEncoder
from dc_ssdae.networks.timm_encoder import TimmEncoder
from dc_ssdae.networks.uvit_decoder import DecoderFeatures, UViTDecoder

__all__ = ["DCEncoder", "DecoderFeatures", "DiffusersEncoder", "KLEncoder", "TimmEncoder", "UViTDecoder"]
