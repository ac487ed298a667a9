"""Model parameters bound to the anchor's memory, and filled there.

The parameters are views of a read-only mapping; the bytes arrive through a second, writable one in a background
thread that starts when the rank does, while the main thread builds process groups and the model skeleton.
"""

import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_loader.loader import BaseModelLoader, _initialize_model, _modules_with_quant_method
from sglang.srt.model_loader.utils import set_default_torch_dtype

from anchortp_sglang.elastic.attachment import Attachment, current, weights_segment
from anchortp_sglang.elastic.checkpoint import Checkpoint
from anchortp_sglang.planning.layout import Placed, ShardLayout, fill_moves, moved_bytes, shard_layout


def _views(memory: Any, layout: ShardLayout, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Each parameter as a tensor over ``memory`` (a mapped weights segment); no copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a read-only mapping is what we want; torch warns about it
        flat = torch.frombuffer(memory, dtype=torch.uint8)

    def view(placed: Placed) -> torch.Tensor:
        piece = flat[placed.offset_bytes : placed.offset_bytes + placed.nbytes]
        return piece.view(dtype).view(placed.shape)

    return {placed.name: view(placed) for placed in layout.params}


def _stacked(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's parameters: slices over experts, which lie side by side, as one tensor each."""
    slices: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    whole = {}
    for name, view in views.items():
        stacked, _, expert = name.partition("[")
        if expert:
            slices[stacked].append(view)
        else:
            whole[name] = view
    for name, (first, *others) in slices.items():
        whole[name] = first.as_strided((1 + len(others), *first.shape), (first.numel(), *first.stride()))
    return whole


class Filler(threading.Thread):
    """Fills this rank's weights segment: what anchors held before from there, the rest from disk."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(name="anchortp-fill", daemon=True)
        self.attachment = attachment
        self.moved: dict[str, int] = {}
        self.waited_from = 0.0
        """When the main thread came to load the model: its process groups are ready then."""
        self.finished_at = 0.0
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            if self.attachment.assignment.previous != self.attachment.assignment.ownership:
                self._fill()
        except BaseException as error:
            self._error = error
        self.finished_at = time.monotonic()

    def wait(self) -> None:
        """Block until every byte is in place. Raises what went wrong while filling."""
        self.join()
        if self._error is not None:
            raise RuntimeError(f"weights could not be filled: {self._error}") from self._error

    def _fill(self) -> None:
        at = self.attachment.assignment
        dtype = getattr(torch, at.model.dtype)
        memory = self.attachment.map(at.device, weights_segment(at.ownership), writable=True)
        target = _views(memory, self.attachment.layout, dtype)
        moves = fill_moves(at.model, at.ownership, at.rank, at.previous)
        holders = {move.device for move in moves if move.device is not None}
        before = {device: self._previous_views(device, dtype) for device in holders}
        with Checkpoint(at.checkpoint) as checkpoint:
            for move in moves:
                into = target[move.param].narrow(move.dim, move.start, move.length)
                if move.device is None:
                    into.copy_(checkpoint.slice(move.source, move.dim, move.source_start, move.length))
                else:
                    into.copy_(before[move.device][move.source].narrow(move.dim, move.source_start, move.length))
        self.moved = moved_bytes(moves)

    def _previous_views(self, device: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        at = self.attachment.assignment
        assert at.previous is not None
        layout = shard_layout(at.model, at.previous, at.previous.devices.index(device))
        memory = self.attachment.map_briefly(device, weights_segment(at.previous))
        return _views(memory, layout, dtype)


_filler: Filler | None = None


def start_filling(attachment: Attachment) -> Filler:
    """Start moving bytes at once; the loader below waits for them."""
    global _filler
    _filler = Filler(attachment)
    _filler.start()
    return _filler


class AnchorModelLoader(BaseModelLoader):
    """Builds the skeleton and binds every parameter to the anchor's memory."""

    def download_model(self, model_config: Any) -> None:
        """The launcher has checked the checkpoint already."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        attachment, filler = current(), _filler
        assert attachment is not None and filler is not None
        filler.waited_from = time.monotonic()
        # On CPU torch.empty takes no memory until it is touched, and no parameter is: binding replaces them.
        with set_default_torch_dtype(model_config.dtype), torch.device(device_config.device):
            model = _initialize_model(model_config, self.load_config)
        addresses = bind(model, attachment)
        filler.wait()
        for module, quant_method in _modules_with_quant_method(model):
            quant_method.process_weights_after_loading(module)
        _check_bound(model, addresses)
        return model.eval()


def bind(model: torch.nn.Module, attachment: Attachment) -> dict[str, int]:
    """Point every parameter at its range in the anchor's memory; returns their addresses.

    Raises RuntimeError unless the model's parameters are exactly those of the layout, shape by shape.
    """
    at = attachment.assignment
    memory = attachment.map(at.device, weights_segment(at.ownership), writable=False)
    views = _stacked(_views(memory, attachment.layout, getattr(torch, at.model.dtype)))
    parameters = dict(model.named_parameters())
    if parameters.keys() != views.keys():
        odd = sorted(parameters.keys() ^ views.keys())
        raise RuntimeError(f"parameters of the model and of the plan differ: {', '.join(odd[:8])}")
    for name, parameter in parameters.items():
        view = views[name]
        if (parameter.shape, parameter.dtype) != (view.shape, view.dtype):
            raise RuntimeError(
                f"{name}: the model has {tuple(parameter.shape)} {parameter.dtype}, the plan "
                f"{tuple(view.shape)} {view.dtype}"
            )
        parameter.data = view
    return {name: view.data_ptr() for name, view in views.items()}


def _check_bound(model: torch.nn.Module, addresses: dict[str, int]) -> None:
    moved = [name for name, p in model.named_parameters() if p.data_ptr() != addresses.get(name)]
    if moved:
        raise RuntimeError(
            f"post-processing took {len(moved)} parameters out of the anchor's memory (first: {moved[0]}); "
            "this CPU's packed-weight kernels are not supported yet"
        )


def around_get_model_loader(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """AROUND model_loader.loader.get_model_loader."""
    if current() is None:
        return original(load_config=load_config, model_config=model_config)
    return AnchorModelLoader(load_config)
