"""A model's language tower: where its blocks are, how rows laid end to end go through them, how it is cut."""

from typing import Any, NamedTuple, TypedDict

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from mm_cb.core.errors import UserError
from mm_cb.models.counted_positions import only_counted_positions

_BLOCK_PATHS = (
    "model.language_model.layers",
    "model.text_model.layers",
    "language_model.model.layers",
    "model.layers",
    "transformer.h",
)
_NORMS = ("norm", "ln_f")


class TowerInputs(NamedTuple):
    """What the language tower starts from.

    Attributes:
        embeds: ``(B, T, H)``.
        extras: ``(B, T, ...)`` each, what is added behind block 0, 1, ..., or what a family's blocks take besides;
            empty in most families.
    """

    embeds: Tensor
    extras: tuple[Tensor, ...] = ()


class ByType(dict[str, Any]):
    """An argument that blocks of different types (``layer_types`` of the configuration) take differently."""


class BlockArguments(TypedDict, total=False):
    """What every block takes beside its state; a `ByType` has one entry for each type of blocks."""

    attention_mask: None
    row_lengths: tuple[int, ...]
    row_masks: Any
    """What the tokens of each row see, ``(1, 1, T, T)``; without it every token sees those before it."""
    position_embeddings: Any
    """Rotary angles, where the tower has them."""
    counted: Tensor
    """Indices of the tokens whose output is looked at, ``(C,)``; without it all are."""


class Rows(NamedTuple):
    """The real tokens of some rows, one row behind the other; N tokens in all.

    Attributes:
        embeds: What the language tower starts from, shape ``(N, H)``.
        positions: Place of every token in its row, shape ``(N,)``, or ``(3, N)`` where a token has a place in space.
        lengths: Tokens of each row.
        mask: 1 for tokens that count in the loss, shape ``(N,)``.
        extras: ``(N, ...)`` each, see `TowerInputs`.
        images: True where a token stands for a part of a picture, shape ``(N,)``.
        counted: Indices of the tokens that count, shape ``(C,)``; None = the top block is run for all tokens.
    """

    embeds: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    mask: Tensor
    extras: tuple[Tensor, ...] = ()
    images: Tensor | None = None
    counted: Tensor | None = None


class LanguageTower:
    """The decoder blocks of a transformers model, by whatever name it has them.

    Attributes:
        model: The transformers model, or the ``PeftModel`` around it.
    """

    model: Any

    @property
    def base(self) -> Any:
        """The transformers model itself, without the adapter's wrapper (adapted layers stay in place)."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        """Where inputs have to be; the CPU for a model of shapes alone."""
        device: torch.device = self.base.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def language_path(self) -> str:
        """Dotted path of the decoder blocks in ``base``: ``"model.language_model.layers"``.

        Raises:
            ValueError: If there is no language tower where one is known to be; lists what was there.
        """
        for path in _BLOCK_PATHS:
            try:
                if isinstance(self.base.get_submodule(path), nn.ModuleList):
                    return path
            except AttributeError:
                continue
        there = [name for name, module in self.base.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(f"Decoder blocks must be at one of {list(_BLOCK_PATHS)}, the model has lists at {there}.")

    @property
    def tower(self) -> Any:
        """The module that holds the decoder blocks."""
        return self.base.get_submodule(self.language_path.rpartition(".")[0])

    @property
    def decoder_blocks(self) -> nn.ModuleList:
        """The blocks of the language tower; ``hidden_states[k]`` is the output of block ``k - 1``."""
        return self.base.get_submodule(self.language_path)

    @property
    def final_norm(self) -> nn.Module:
        """What the last hidden state goes through."""
        return getattr(self.tower, self._norm_name())

    def _norm_name(self) -> str:
        return next(norm for norm in _NORMS if hasattr(self.tower, norm))

    @property
    def layer_types(self) -> list[str]:
        """The type of every block, where there are several."""
        return getattr(self.tower.config, "layer_types", None) or []

    def first_state(self, rows: Rows) -> Tensor:
        """The input of block 0, ``(1, N, H)``."""
        embeds = rows.embeds[None]
        return embeds + self.tower.wpe(rows.positions[None]) if hasattr(self.tower, "wpe") else embeds

    def block_arguments(self, rows: Rows) -> BlockArguments:
        """What every block takes beside its state, for rows laid end to end: their lengths and rotary angles."""
        arguments: BlockArguments = {"attention_mask": None, "row_lengths": rows.lengths}
        if hasattr(self.tower, "rotary_emb"):
            rotary, places = self.tower.rotary_emb, (rows.embeds[None], rows.positions[..., None, :])
            if hasattr(rotary, "layer_types"):
                angles: Any = ByType({kind: rotary(*places, kind) for kind in set(self.layer_types)})
            else:
                angles = rotary(*places)
            arguments["position_embeddings"] = angles
        return arguments

    def run_block(self, index: int, state: Tensor, arguments: BlockArguments) -> Tensor:
        """The output of a block, ``(1, N, H)``: ``hidden_states[index + 1]``, up to the final norm."""
        given: dict[str, Any] = {**arguments}
        block, counted = self.decoder_blocks[index], given.pop("counted", None)
        own = {n: v[self.layer_types[index]] if isinstance(v, ByType) else v for n, v in given.items()}
        with only_counted_positions(block, counted):
            return block(state, **own)

    def next_state(self, index: int, state: Tensor, rows: Rows) -> Tensor:
        """What block ``index + 1`` starts from: the output of the one before, and what its family adds there."""
        return state + rows.extras[index] if index < len(rows.extras) else state

    def cache(self) -> DynamicCache:
        """An empty cache of what the blocks made of earlier tokens, through which gradients go back to them."""
        return DynamicCache(config=self.tower.config)

    @classmethod
    def blocks_read(cls, config: Any, blocks: int) -> int:
        """How many decoder blocks have to be read where ``blocks`` are wanted: more where they share parameters."""
        return blocks

    @classmethod
    def cut_config(cls, config: Any, blocks: int) -> None:
        """Have a configuration describe decoder blocks 0 to ``blocks - 1`` alone, or all that have to be read."""
        text, blocks = config.get_text_config(), cls.blocks_read(config, blocks)
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]

    def logits(self, states: Tensor) -> Tensor:
        """What the head makes of last hidden states, those behind the final norm: ``(..., H)`` -> ``(..., V)``.

        Raises:
            UserError: If the model scales its logits in a way that is not known here.
        """
        config = self.base.config.get_text_config()
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise UserError(f"logits of a {config.model_type} are scaled by `{name}`, which is not supported here.")
        logits, cap = self.base.lm_head(states), getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def keep_blocks(self, blocks: int, *, final_norm: bool, head: bool = False) -> None:
        """Drop what training on hidden states does not need: the decoder blocks from ``blocks`` on and the head.

        Call it before an adapter is put on. Paths of what is left stay the same; without head the ``logits`` of the
        model are then its last hidden state.

        Args:
            blocks: How many decoder blocks stay; ``hidden_states`` then has ``blocks + 1`` entries.
            final_norm: Whether the last entry still goes through the final norm.
            head: Whether the head stays.
        """
        tower = self.tower
        setattr(tower, self.language_path.rpartition(".")[2], self.decoder_blocks[:blocks])
        self.cut_config(tower.config, blocks)
        if not final_norm:
            setattr(tower, self._norm_name(), nn.Identity())
        if not head:
            self.base.lm_head = nn.Identity()
