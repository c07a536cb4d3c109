# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction layers, which transformers leaves out: built, loaded and run behind the last layer."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelslim.api import Checkpoint, hookimpl
from modelslim_transformers.adapter import TransformersAdapter
from modelslim_transformers.tiny import write_tiny_checkpoint


class MtpAdapter(TransformersAdapter):
    """Adds to a decoder the multi-token prediction layers that its checkpoint holds.

    They are stored, after the manner of DeepSeek-V3, as decoder layers with numbers from ``num_hidden_layers`` on, and
    become units of those names, so that patterns select their linears like all others. The embedding and the head that
    are stored with them (``embed_tokens``, ``shared_head.head``) repeat those of the model: they are copied, not run.
    """

    @cached_property
    def mtp_layers(self) -> int:
        """How many such layers the checkpoint holds; config.json counts them also where they were not saved.

        Those of a multimodal model are left out, and so copied: what they see at the places of an image is not known.
        """
        if self.is_multimodal:
            return 0
        # Their norm and not their projection, which goes by other names once it is quantized.
        norms = re.compile(r"(.+\.)?layers\.\d+\.enorm\.weight")
        return sum(norms.fullmatch(name) is not None for name in Checkpoint(self.model_path).stored)

    def build(self) -> nn.Module:
        """The model, which runs its multi-token prediction layers when it is called and gives what it gives without."""
        model: nn.Module = super().build()
        language: Any = model
        _, layers = self.language_layers(model)
        template = layers[-1]
        for _ in range(self.mtp_layers):
            layers.append(_mtp_layer(template, len(layers)))
        if self.mtp_layers:
            language.get_decoder().register_forward_hook(self._keep_hidden)
            model.register_forward_hook(self._run, with_kwargs=True)
        return model

    @hookimpl
    def make_tiny_checkpoint(self, model: nn.Module, path: Path) -> list[dict[str, Any]]:
        """The architecture with every kind of its layers, those of multi-token prediction too, and all sizes small."""

        def build(tiny: Path) -> nn.Module:
            adapter = type(self)(self.model_type, tiny, self.trust_remote_code)
            adapter.mtp_layers = self.mtp_layers
            return adapter.build()

        layers = list(self.language_layers(model)[1])[: self.config.get_text_config().num_hidden_layers]
        return write_tiny_checkpoint(self.model_path, self.config, layers, build, path)

    def run_mtp_layers(self, model: Any, input_ids: Tensor, hidden: Tensor, logits: Tensor) -> list[Tensor]:
        """Run the multi-token prediction layers as an engine does when it drafts.

        At each position the first layer sees the embedding of the next token and the hidden state of the decoder, the
        second that of the token after it and the hidden state of the first, and so on. Behind the end of the sample
        stand the tokens that the model, and the layers themselves, find most likely.

        Args:
            model: with its layers.
            input_ids: [1, tokens].
            hidden: the decoder's output, behind its last norm, [1, tokens, hidden size].
            logits: those of the last token at least, [1, tokens, vocabulary].

        Returns:
            What each layer gives, behind its norm, [1, tokens, hidden size].
        """
        decoder = model.get_decoder()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        outputs: list[Tensor] = []
        for layer in decoder.layers[model.config.get_text_config().num_hidden_layers :]:
            input_ids = torch.cat((input_ids[:, 1:], logits[:, -1:].argmax(-1)), 1)
            positions = positions + 1
            embeds = model.get_input_embeddings()(input_ids)
            hidden = layer(
                embeds,
                hidden,
                attention_mask=self.mtp_mask(model, embeds, positions),
                position_ids=positions,
                position_embeddings=decoder.rotary_emb(embeds, position_ids=positions),
            )
            logits = model.get_output_embeddings()(hidden[:, -1:])
            outputs.append(hidden)
        return outputs

    def mtp_mask(self, model: Any, embeds: Tensor, positions: Tensor) -> Tensor | None:
        """The attention mask of a multi-token prediction layer, made as the model makes that of its decoder."""
        from transformers.masking_utils import create_causal_mask

        mask: Tensor | None = create_causal_mask(model.config.get_text_config(), embeds, None, None, positions)
        return mask

    def _keep_hidden(self, _decoder: nn.Module, _args: Any, output: Any) -> None:
        self._hidden: Tensor = output.last_hidden_state

    def _run(self, model: nn.Module, _args: Any, kwargs: Any, output: Any) -> None:
        # No unit lies between the decoder's end and this line, so that no other sample came in between.
        hidden = self._hidden
        del self._hidden
        self.run_mtp_layers(model, kwargs["input_ids"], hidden, output.logits)


class _MtpLayer(nn.Module):
    """What a multi-token prediction layer has around its decoder layer; comes first among the bases."""

    enorm: nn.Module
    hnorm: nn.Module
    eh_proj: nn.Linear
    shared_head: nn.ModuleDict

    def forward(self, embeds: Tensor, hidden: Tensor, **kwargs: Any) -> Tensor:
        joined = self.eh_proj(torch.cat((self.enorm(embeds), self.hnorm(hidden)), -1))
        output: Tensor = self.shared_head["norm"](super().forward(joined, **kwargs))
        return output


def _mtp_layer(template: nn.Module, number: int) -> nn.Module:
    """A multi-token prediction layer whose decoder layer is like the last one of the model."""
    # Not built anew, since some classes look up the layer's number in lists that end before it.
    shared = {id(config): config for config in (getattr(part, "config", None) for part in template.modules())}
    layer: Any = deepcopy(template, shared)
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = number
    norm: Any = template.input_layernorm
    width = norm.weight.numel()
    layer.enorm, layer.hnorm = deepcopy(norm), deepcopy(norm)
    layer.eh_proj = nn.Linear(2 * width, width, bias=False, dtype=norm.weight.dtype, device=norm.weight.device)
    layer.shared_head = nn.ModuleDict({"norm": deepcopy(norm)})
    layer.__class__ = type(f"Mtp{type(template).__name__}", (_MtpLayer, type(template)), {})
    made: nn.Module = layer.eval()
    return made
