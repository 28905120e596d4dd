"""The engine: tokenizer, sampling, continuous batching and the life of a request."""

from bitgrain.engine.engine import Engine, EngineOptions
from bitgrain.engine.llm import LLM, Completion
from bitgrain.engine.request import Delta, Finish, Request
from bitgrain.engine.sampler import TokenLogprob
from bitgrain.engine.sampling import SamplingParams
from bitgrain.engine.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "Completion",
    "Delta",
    "Engine",
    "EngineOptions",
    "Finish",
    "Request",
    "SamplingParams",
    "TokenLogprob",
    "Tokenizer",
]
