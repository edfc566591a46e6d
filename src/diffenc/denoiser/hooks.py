"""Context managers that read a module while it runs, and leave it as they found it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.denoiser.adaptive_norm import pack_input
from diffenc.denoiser.shortening import copy_ways
from diffenc.denoiser.transformers import carried_grid, layout_of
from diffenc.errors import TapError, near_matches
from diffenc.runtime.threads import for_this_thread


class AllTapsRead(BaseException):
    """Raised inside a forward pass when nothing that follows can change a tap.

    A BaseException, so that no `except Exception` on the way swallows it.
    """


class ForwardTaps:
    """Feature maps of named submodules while the `with` block is open.

    Outputs over tokens (b n c), such as those of transformer blocks and projections, come back as
    maps: their height and width are read off the `Transformer2DModel` around them, or off the
    latents of a diffusion transformer, of whose joint outputs the picture's part is kept. With
    `early_exit` the pass ends, exactly and at any size, once every tap has been read; `run` hides
    the exception that does it. What other threads pass through the module meanwhile is left alone,
    unless `any_thread` says that calls of all threads are read. Of norms in `packed`, what they are
    given is kept in place of their output, see `diffenc.denoiser.adaptive_norm.pack_input`.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        *,
        early_exit: bool = False,
        any_thread: bool = False,
        packed: Sequence[str] = (),
    ) -> None:
        known = dict(module.named_modules())
        if missing := [name for name in names if name not in known]:
            raise TapError(
                f"{type(module).__name__} has no module named {missing[0]!r}."
                f"{near_matches(missing[0], known)} Its top level is "
                f"{[name for name, _ in module.named_children()]}; "
                "diffenc.list_taps(backbone) gives every valid name."
            )
        self._targets = {name: known[name] for name in names}
        self._layout = layout_of(module)
        self._carriers = {
            name: _carrier(known, name) if self._layout is None else module for name in names
        }
        self._early_exit, self._any_thread = early_exit, any_thread
        self._packed = tuple(packed)
        self._grids: dict[nn.Module, tuple[int, int]] = {}
        self.known_grid: tuple[int, int] | None = None
        self._outputs: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "ForwardTaps":
        self._outputs.clear()
        bound = (lambda hook: hook) if self._any_thread else for_this_thread
        with ExitStack() as stack:  # a failure half-way removes what is already registered
            note_grid = bound(self._note_grid)
            for carrier in {c for c in self._carriers.values() if c is not None}:
                handle = carrier.register_forward_pre_hook(note_grid, with_kwargs=True)
                stack.callback(handle.remove)
            for name, target in self._targets.items():
                packs = name in self._packed
                read = bound(self._packer(name) if packs else self._reader(name))
                handle = target.register_forward_hook(read, with_kwargs=packs)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        self._grids.clear()

    def __getitem__(self, name: str) -> Float[Tensor, "b c h w"]:
        if name not in self._outputs:
            raise TapError(
                f"nothing was read at {name!r}: the denoiser does not call it now. Fused "
                "projections (its unfuse_qkv_projections() separates them) and attention "
                "processors of other libraries pass projections by (a U-Net's "
                "set_default_attn_processor() brings the usual ones back); else read another tap"
            )
        return self._outputs[name]

    def run(self, call: Callable[[], Any]) -> dict[str, Float[Tensor, "b c h w"]]:
        """Call, until done or until all taps are read, and return them in the order asked for.

        Raises:
            TapError: A module did not run.
        """
        with suppress(AllTapsRead):
            call()
        return {name: self[name] for name in self._targets}

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = self.known_grid or carried_grid(module, args, kwargs)
        self._grids[module] = grid

    def _reader(self, name: str) -> Callable[..., None]:
        carrier, layout = self._carriers[name], self._layout

        def map_of(output: Any) -> Tensor:
            if layout is not None and carrier is not None:
                return layout.image_map(name, output, self._grids[carrier])
            # Down blocks return (hidden, residuals), transformers a 1-tuple, the rest a tensor.
            features: Tensor = output[0] if isinstance(output, tuple) else output
            if features.ndim == 3 and carrier is not None:
                h, w = self._grids[carrier]
                features = rearrange(features, "b (h w) c -> b c h w", h=h, w=w)
            return features

        def read(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._keep(name, map_of(output))

        return read

    def _packer(self, name: str) -> Callable[..., None]:
        carrier, layout = self._carriers[name], self._layout
        assert carrier is not None  # adaptive norms are of transformers
        assert layout is not None

        def read(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any
        ) -> None:
            self._keep(name, pack_input(layout, name, args, kwargs, self._grids[carrier]))

        return read

    def _keep(self, name: str, maps: Tensor) -> None:
        self._outputs[name] = maps
        if self._early_exit and len(self._outputs) == len(self._targets):
            raise AllTapsRead


class TapOutputs(nn.Module):
    """A U-Net that returns its taps: what `torch.compile` needs, which ignores later hooks.

    The hooks sit on copies of the modules that lead to the taps, so the U-Net itself has none.

    Args:
        unet: A `UNet2DConditionModel`, best one that ends after the last tap.
        names: Module paths of the taps.

    Raises:
        TapError: The U-Net has no such module.
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet = copy_ways(unet, names)[""]
        self.names = tuple(names)
        self._taps = ForwardTaps(self.unet, names, any_thread=True)
        self._taps.__enter__()

    def forward(
        self, *args: Any, grid: tuple[int, int] | None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "b _c _h _w"], ...]:
        """Call the U-Net with these arguments; a map per tap, in the order of `names`.

        Args:
            args: Positional arguments of the U-Net.
            grid: Rows and columns of the picture's tokens, of a transformer whose latents are
                packed: a graph does not see the numbers in its arguments. None reads them there.
            kwargs: Keyword arguments of the U-Net.
        """
        self._taps.known_grid = grid
        self.unet(*args, **kwargs)
        return tuple(self._taps[name] for name in self.names)


def _carrier(known: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The transformer that flattens the map around `name`; None outside of one."""
    while "." in name:
        name = name.rpartition(".")[0]
        if type(known[name]).__name__ == "Transformer2DModel":
            return known[name]
    return None
