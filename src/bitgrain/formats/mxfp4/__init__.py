"""Mixtures of experts whose experts are MXFP4, as the gpt-oss models store them."""

from __future__ import annotations

from bitgrain.formats.mxfp4.config import MXFP4MoEConfig

CONFIG = MXFP4MoEConfig
