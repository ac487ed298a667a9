"""Binds model parameters to the anchor's memory, and fills them there.

The parameters are views of a read-only mapping; the bytes arrive through a second, writable one in a background
thread that starts when the rank does, while the main thread builds process groups and the model skeleton.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, nullcontext
from itertools import groupby
from typing import Any

import torch
from sglang.srt.model_loader.loader import (
    BaseModelLoader,
    _get_quantization_config,
    _initialize_model,
    _modules_with_quant_method,
    post_load_weights,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype

from anchortp_sglang.memory.arena import map_ahead
from anchortp_sglang.planning.layout.extents import ShardExtents
from anchortp_sglang.planning.layout.moves import Move, fill_moves, moved_bytes
from anchortp_sglang.planning.layout.shards import ParamSlot, ShardLayout, shard_layout
from anchortp_sglang.platforms.mover import Mover, Write
from anchortp_sglang.rank.attachment import Attachment, current
from anchortp_sglang.rank.weights.checkpoint import Checkpoint
from anchortp_sglang.rank.weights.config import building
from anchortp_sglang.rank.weights.pace import Pace
from anchortp_sglang.rank.weights.random_checkpoint import RandomCheckpoint
from anchortp_sglang.rank.weights.skeleton import Skeleton, placeholders

log = logging.getLogger(__name__)


def _views(flat: torch.Tensor, layout: ShardLayout) -> dict[str, torch.Tensor]:
    """View each parameter as a tensor over ``flat`` (the bytes of a weights segment); no copy."""

    def view(placed: ParamSlot) -> torch.Tensor:
        piece = flat[placed.offset_bytes : placed.offset_bytes + placed.nbytes].view(getattr(torch, placed.dtype))
        return piece.view(placed.shape[::-1]).t() if placed.column_major else piece.view(placed.shape)

    return {placed.name: view(placed) for placed in layout.params}


def _stacked(views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join slices over experts, which lie side by side, into one tensor each: the model's parameters."""
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
    """Fills this rank's weights segment: from the anchors' old segments, the rest from disk."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(name="anchortp-fill", daemon=True)
        self.attachment = attachment
        self.moved: dict[str, int] = {}
        self.waited_from = 0.0
        """Time when the main thread came to load the model: its process groups are ready then."""
        self.finished_at = 0.0
        self.bound_at = 0.0
        """Time when the model was complete: skeleton built, parameters bound, every byte in place."""
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            if self.attachment.assignment.previous != self.attachment.assignment.weights:
                self._fill()
        except BaseException as error:
            self._error = error
        self.finished_at = time.monotonic()

    def wait(self) -> None:
        """Block until every byte is in place. Raises the error of filling."""
        self.join()
        if self._error is not None:
            raise RuntimeError(f"weights could not be filled: {self._error}") from self._error

    def _fill(self) -> None:
        assignment, layout = self.attachment.assignment, self.attachment.layout
        before = None if assignment.previous is None else assignment.previous.ownership
        shard = assignment.weights.shards[assignment.rank]
        moves = fill_moves(assignment.model, assignment.ownership, assignment.rank, before, assignment.leaving)
        with ExitStack() as stack:
            memory = self.attachment.shard_briefly(assignment.device, shard, writable=True)
            target = _Shard(stack.enter_context(memory), layout)
            sources = {
                device: self._previous(device, stack)
                for device in {move.device for move in moves if move.device is not None}
            }
            checkpoint: Checkpoint | RandomCheckpoint = (
                RandomCheckpoint(assignment.model)
                if assignment.random_weights
                else stack.enter_context(Checkpoint(assignment.checkpoint))
            )
            mover = stack.enter_context(self._mover(target, shard, stack))  # left first, when all has arrived
            for name, start, length in layout.padding:
                mover.clear(target.views[name].narrow(target.placed[name].dim, start, length))
            pace = Pace(assignment.fill_bytes_per_s)
            for layer, of_layer in groupby(moves, key=lambda move: target.placed[move.param].layer):
                for move in of_layer:
                    if move.device is None:
                        into = target.elements(move)
                        mover.load(into, checkpoint.read(move, into.dtype))
                        pace.moved(into.nbytes)
                    else:
                        for into, source in _copies(move, target, sources[move.device], shard):
                            mover.copy(into, source)
                            pace.moved(into.nbytes)
                mover.layer_done(layer)
        reused = shard.reused_bytes
        log.info("anchortp: weights of rank %d: %d MiB stay in place; %s", assignment.rank, reused >> 20, mover.moved)
        self.moved = moved_bytes(moves)
        self.moved["copy"] -= reused

    def _mover(self, target: "_Shard", shard: ShardExtents, stack: ExitStack) -> Mover:
        assignment = self.attachment.assignment

        def open_writer() -> Write:
            write = stack.enter_context(self.attachment.shard_writer(assignment.device, shard))
            return lambda part, data: write(part.data_ptr() - target.flat.data_ptr(), data)

        return assignment.platform.mover(assignment.device, open_writer)

    def _previous(self, device: int, stack: ExitStack) -> "_Shard":
        assignment = self.attachment.assignment
        assert assignment.previous is not None
        layout = shard_layout(
            assignment.model, assignment.previous.ownership, assignment.previous.ownership.devices.index(device)
        )
        memory = self.attachment.shard_briefly(device, assignment.previous.shard_of(device), writable=False)
        return _Shard(stack.enter_context(memory), layout)


class _Shard:
    """The bytes of a shard, and its parameters as tensors over them."""

    def __init__(self, flat: torch.Tensor, layout: ShardLayout) -> None:
        self.flat = flat
        self.placed = {each.name: each for each in layout.params}
        self.views = _views(flat, layout)

    def elements(self, move: Move) -> torch.Tensor:
        """View the elements that a move fills."""
        return self.views[move.param].narrow(move.dim, move.start, move.length)


def _copies(
    move: Move, target: _Shard, source: _Shard, shard: ShardExtents
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a move's copies, piece by piece: (into, source). ``shard``: where the target's bytes lie."""
    into = target.placed[move.param].run(move.start, move.length)
    of = source.placed[move.source].run(move.source_start, move.length)
    if into is None or of is None:
        yield target.elements(move), source.views[move.source].narrow(move.dim, move.source_start, move.length)
        return
    for start, stop in shard.to_fill(into):
        yield target.flat[start:stop], source.flat[start - into[0] + of[0] : stop - into[0] + of[0]]


def start_filling(attachment: Attachment) -> Filler:
    """Start moving bytes at once; the loader below waits for them."""
    filler = Filler(attachment)
    filler.start()
    return filler


class AnchorModelLoader(BaseModelLoader):
    """Builds the skeleton and binds every parameter to the anchor's memory."""

    def download_model(self, model_config: Any) -> None:
        """Download nothing: the launcher has checked the checkpoint already."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        attachment = current()
        assert attachment is not None
        filler = attachment.filler
        filler.waited_from = time.monotonic()
        # Lazy memory is not taken until it is touched, and no parameter is: binding replaces them.
        lazy = attachment.assignment.platform.lazy_memory
        skeleton = nullcontext() if lazy else Skeleton()
        device = torch.device(device_config.device)
        with set_default_torch_dtype(model_config.dtype), device, building(attachment, model_config), skeleton:
            quantization = _get_quantization_config(model_config, self.load_config)
            model = _initialize_model(model_config, self.load_config, quantization)
        addresses = bind(model, attachment)
        if not lazy and (unbound := list(placeholders(model))):
            raise RuntimeError(
                f"tensors of the model are no parameters and were never filled: {', '.join(unbound[:8])}"
            )
        filler.wait()
        post_load_weights(model)  # what load_weights would derive: DeepSeek's w_kc and w_vc
        for module, quant_method in _modules_with_quant_method(model):
            quant_method.process_weights_after_loading(module)
        _check_bound(model, addresses)
        filler.bound_at = time.monotonic()
        return model.eval()


def bind(model: torch.nn.Module, attachment: Attachment) -> dict[str, int]:
    """Point every parameter at its range in the anchor's memory; return their addresses.

    Buffers that the layout has, such as Gemma-4's ``layer_scalar``, are parameters here. Raises RuntimeError unless the
    model's parameters are exactly those of the layout, shape by shape.
    """
    flat = attachment.weights()
    if attachment.standing_by and attachment.assignment.platform.lazy_memory:
        map_ahead(flat.data_ptr(), flat.numel())  # now there is time for it
    views = _stacked(_views(flat, attachment.layout))
    parameters = _parameters(model, views)
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


def _parameters(model: torch.nn.Module, names: Container[str]) -> dict[str, torch.Tensor]:
    """Return all parameters of a model, and its buffers that are in ``names``."""
    return dict(model.named_parameters()) | {name: each for name, each in model.named_buffers() if name in names}


def _check_bound(model: torch.nn.Module, addresses: dict[str, int]) -> None:
    moved = [name for name, each in _parameters(model, addresses).items() if each.data_ptr() != addresses.get(name)]
    if moved:
        raise RuntimeError(
            f"post-processing took {len(moved)} parameters out of the anchor's memory (first: {moved[0]}); "
            "kernels that pack weights their own way (on CPUs those for AMX) are not supported yet"
        )


def around_get_model_loader(original: Callable[..., Any], load_config: Any, model_config: Any = None) -> Any:
    """AROUND model_loader.loader.get_model_loader."""
    if current() is None:
        return original(load_config=load_config, model_config=model_config)
    return AnchorModelLoader(load_config)
