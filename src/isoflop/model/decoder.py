"""The decoder: embedding, layers, final norm, head. One device, one process; parallelism is
applied from outside.

Parameter names are a contract, the same paths as in the count trees: `embedding.tokens.weight`,
`layers.0.attention.q.weight`, `layers.0.feed_forward.down.bias`, `final_norm.weight`, ...

Letters: B batch · T tokens · D d_model · V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from isoflop.arch.spec import Arch, Learned
from isoflop.errors import InputError, Problem
from isoflop.model.attention import Context, contexts
from isoflop.model.layer import make_layer
from isoflop.model.loss import head_loss
from isoflop.model.parts import EmbeddingModule, make_head, make_norm
from isoflop.model.relative_bias import make_relative_bias, stack_bias


class Decoder(nn.Module):
    """A decoder-only language model; `build` makes one.

    Weights are left as PyTorch allocates them: `build` initialises them.
    """

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.embedding = EmbeddingModule(arch)
        self.relative_bias = make_relative_bias(arch.layers)
        self.layers = nn.ModuleList(make_layer(layer, arch.d_model) for layer in arch.layers)
        self.final_norm = make_norm(arch.final_norm, arch.d_model)
        self.head = make_head(arch)

    def forward(self, tokens_BT: Tensor, *, targets_BT: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the token after each, or with targets their `loss`.

        Padded rows of the head are cut off.

        Raises:
            InputError: more tokens than there are learned positions.
        """
        x_BTD = self._embed(tokens_BT)
        return self._read(x_BTD, self._told(x_BTD), targets_BT)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats per token, in at least single precision.

        A target of -100 is left out of the mean.
        """
        loss: Tensor = self(tokens_BT, targets_BT=targets_BT)
        return loss

    def through_layers(self, x_BTD: Tensor, told: Sequence[Context]) -> Tensor:
        """What the final norm leaves, [B, T, D]; each layer is told its own context."""
        for context, layer in zip(told, self.layers, strict=True):
            x_BTD = layer(x_BTD, context)
        y_BTD: Tensor = self.final_norm(x_BTD)
        return y_BTD

    def read_out(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] from what the final norm left."""
        logits_BTV: Tensor = self.head(x_BTD, self.embedding.tokens.weight)
        return logits_BTV[..., : self.arch.vocab_size]

    def _told(self, x_BTD: Tensor) -> dict[str, Context]:
        """What each kind of layer is told of a text, by its name."""
        return contexts(self.arch, x_BTD, stack_bias(self.relative_bias, x_BTD.shape[1]))

    def _read(
        self, x_BTD: Tensor, told: Mapping[str, Context], targets_BT: Tensor | None
    ) -> Tensor:
        """Logits from embedded tokens, or with targets their loss."""
        y_BTD = self.through_layers(x_BTD, [told[x.name] for x in self.arch.layers])
        if targets_BT is None:
            return self.read_out(y_BTD)
        embedding_VD = self.embedding.tokens.weight
        return head_loss(self.head, y_BTD, embedding_VD, targets_BT, self.arch.vocab_size)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        n_tokens, learned = tokens_BT.shape[-1], self.arch.embedding.position
        if isinstance(learned, Learned) and n_tokens > learned.n_positions:
            rule = f"is at most {learned.n_positions}, the learned positions"
            raise InputError(self.arch.name, [Problem("tokens", n_tokens, rule)])
        x_BTD: Tensor = self.embedding(tokens_BT, torch.arange(n_tokens, device=tokens_BT.device))
        return x_BTD
