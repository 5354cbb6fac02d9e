"""The decoder: embedding, layers, final norm, head. One device, one process; parallelism is
applied from outside.

Parameter names are a contract, the same paths as in the count trees: `embedding.tokens.weight`,
`layers.0.attention.q.weight`, `layers.0.feed_forward.down.bias`, `final_norm.weight`, ...

Letters: B batch · T tokens · D d_model · V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isoflop.arch.spec import Arch, Attention, Learned, Rope
from isoflop.errors import InputError, Problem
from isoflop.model.layer import make_layer
from isoflop.model.parts import EmbeddingModule, HeadModule, make_norm, mean_loss
from isoflop.model.relative_bias import make_relative_bias, stack_bias
from isoflop.model.rotary import Rotation


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
        self.head = HeadModule(arch.head, arch.embedding.n_rows, arch.d_model)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of the token after each; padded rows of the head are cut off.

        Raises:
            InputError: more tokens than there are learned positions.
        """
        return self.logits(self._embed(tokens_BT))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] from embedded tokens."""
        rotations, bias = self._rotations(x_BTD), stack_bias(self.relative_bias, x_BTD.shape[1])
        for spec, layer in zip(self.arch.layers, self.layers, strict=True):
            x_BTD = layer(x_BTD, rotations[spec.name], bias)
        x_BTD = self.final_norm(x_BTD)
        logits_BTV: Tensor = self.head(x_BTD, self.embedding.tokens.weight)
        return logits_BTV[..., : self.arch.vocab_size]

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats per token, in at least single precision.

        A target of -100 is left out of the mean.
        """
        return mean_loss(self(tokens_BT), targets_BT)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        n_tokens, learned = tokens_BT.shape[-1], self.arch.embedding.position
        if isinstance(learned, Learned) and n_tokens > learned.n_positions:
            rule = f"is at most {learned.n_positions}, the learned positions"
            raise InputError(self.arch.name, [Problem("tokens", n_tokens, rule)])
        x_BTD: Tensor = self.embedding(tokens_BT, torch.arange(n_tokens, device=tokens_BT.device))
        return x_BTD

    def _rotations(self, x_BTD: Tensor) -> dict[str, Rotation | None]:
        """The rotary turns of each kind of layer; equal ones are computed once."""
        positions_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        done: dict[tuple[Rope, int], Rotation] = {}
        found: dict[str, Rotation | None] = {}
        for name, layer in self.arch.kinds.items():
            match layer.attention:
                case Attention(position=Rope() as rope, d_head=d_head):
                    key = (rope, d_head)
                    if key not in done:
                        done[key] = Rotation.of(rope, d_head, positions_T, x_BTD.dtype)
                    found[name] = done[key]
                case _:
                    found[name] = None
        return found
