"""The engine: tokens in, gradients and weights out. Nothing here knows of messages, rewards, recipes or HTTP.

Names are looked up on first use, so that `import core` costs nothing until a recipe starts.
"""

from importlib import import_module

_HOME = {
    "AdamParams": "datum",
    "Datum": "datum",
    "EncodedTextChunk": "datum",
    "ForwardBackwardOutput": "datum",
    "LoraConfig": "datum",
    "ModelInfo": "datum",
    "ModelInput": "datum",
    "OptimStepOutput": "datum",
    "SampleResponse": "datum",
    "SampledSequence": "datum",
    "SamplingClient": "sampling_client",
    "SamplingParams": "datum",
    "SaveOutput": "datum",
    "StreamedToken": "token_stream",
    "TokenStream": "token_stream",
    "EngineOptions": "machine",
    "DamagedCheckpoint": "checkpoints",
    "Future": "futures",
    "LOSSES": "losses",
    "ModelNotFound": "models",
    "ServiceClient": "clients",
    "TrainingClient": "clients",
    "UnsupportedModel": "decoder",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'core' has no attribute '{name}'")
    return getattr(import_module(f"core.{_HOME[name]}"), name)
