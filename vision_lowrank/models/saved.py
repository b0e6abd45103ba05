"""Models from folders that `save_pretrained` wrote."""

import contextlib
import io
from pathlib import Path
from typing import Any

from torch import nn


def note_settings(model: Any, **settings: Any) -> None:
    """Lets `save_pretrained` write present settings instead of those which the model was made with."""
    if hasattr(model, "_hub_mixin_config"):
        model._hub_mixin_config.update(settings)


def load_saved(kind: type[nn.Module], folder: str | Path) -> Any:
    """Returns the model of a folder with `config.json` and `model.safetensors`; nothing is fetched.

    Tensors that the file lacks or that the model does not have are an error, where the hub's mixin would leave them
    random without a word; what it prints is left out.

    Args:
        kind: class of the model, with the hub's mixin.
        folder: what `save_pretrained` wrote.

    Raises:
        Exception: whatever the mixin raises; callers say what it means to them.
    """
    loader: Any = kind
    with contextlib.redirect_stdout(io.StringIO()):
        return loader.from_pretrained(folder, local_files_only=True, strict=True)
