"""A fitted hierarchy: a chain of modules per input, and the meta-learner on top where there is one; kept and read.

Its file `hierarchy.safetensors` holds the tensors of all modules but the trunk of the first network, which is the
artifact's own encoder, and as metadata how they are put together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from cluster.errors import UsageError
from training.artifact import HIERARCHY
from training.tasks.learners import SmallNetwork, asked, classifier_of
from training.tasks.stacking import Meta, averaged, evidence_of, load_meta
from training.tasks.structures import Chain, Head, tree_for

Build = Callable[[int], nn.Module]
"""A network of the artifact's architecture with so many outputs."""
See = Callable[[nn.Module], np.ndarray]
"""Pooled features [N, D] of some images under a network."""


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """What was fitted on one training set."""

    classes: tuple[str, ...]
    structure: str
    learner: str
    """network: its modules are networks of the encoder's kind; features: small ones on the encoder's features."""
    chains: tuple[Chain, ...]
    """Of each input."""
    inputs: tuple[str, ...] = ()
    """Their names; empty where all images are of one kind."""
    stack: str = "none"
    meta: Meta | None = None
    """The meta-learner that `stack` names."""

    @property
    def needs_pixels(self) -> bool:
        """Whether features under the encoder are not enough."""
        return self.learner == "network" and (len(self.chains) > 1 or len(self.chains[0].modules) > 1)

    def probabilities(self, answers: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [U, K], each row's sum 1, of each chain's answers [U, width], NaN where its input is missing."""
        if self.meta is None:
            return averaged(self.chains, answers)
        return self.meta.probabilities(evidence_of(self.chains, answers))

    def answers(self, chain: Chain, features: np.ndarray, see: See | None) -> np.ndarray:
        """What a chain says, float64 [N, width], of images with features [N, D] under the encoder.

        Args:
            see: the images under another network of the encoder's kind; not asked where `needs_pixels` is false.
        """
        logits = []
        for module in chain.modules:
            own = self.learner == "features" or module is self.chains[0].modules[0]
            if not own and see is None:
                raise ValueError("the networks of this hierarchy look at pixels")
            logits.append(asked(module, features if own or see is None else see(module)))
        return chain.answers(logits, len(features))

    def to(self, device: str) -> Hierarchy:
        for chain in self.chains:
            for module in chain.modules:
                module.requires_grad_(False).eval().to(device)
        return self

    def dumps(self) -> bytes:
        """The file `hierarchy.safetensors`."""
        tensors: dict[str, torch.Tensor] = {}
        told = []
        for number, chain in enumerate(self.chains):
            told.append({"heads": [asdict(head) for head in chain.heads], "epochs": chain.epochs})
            for place, module in enumerate(chain.modules):
                kept = module.state_dict()
                if self.learner == "network" and number == place == 0:
                    kept = classifier_of(module).state_dict()
                tensors |= {f"{number}/{place}/{name}": t.detach().cpu().contiguous() for name, t in kept.items()}
        if self.meta is not None:
            tensors |= {f"meta/{name}": torch.from_numpy(values) for name, values in self.meta.tensors().items()}
        about = {name: getattr(self, name) for name in ("structure", "learner", "inputs", "stack")}
        return bytes(safetensors.torch.save(tensors, metadata={"hierarchy": json.dumps(about | {"chains": told})}))


def load_hierarchy(content: bytes, classes: Sequence[str], encoder: nn.Module, build: Build) -> Hierarchy:
    """The inverse of `Hierarchy.dumps`; `encoder` are the artifact's own weights, without a classifier.

    Raises:
        UsageError: it is damaged, or of another model.
    """
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")  # safetensors: a length, then as many bytes of JSON
        about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["hierarchy"])
        told = about.pop("chains")
        about |= {"inputs": tuple(about["inputs"])}
        shell = Hierarchy(tuple(classes), chains=(), **about)
        chains = tuple(_chain(shell, number, one, tensors, encoder, build) for number, one in enumerate(told))
        top = {n.removeprefix("meta/"): t.numpy() for n, t in tensors.items() if n.startswith("meta/")}
        meta = load_meta(shell.stack, top, len(classes)) if shell.stack != "none" else None
        return replace(shell, chains=chains, meta=meta)
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(f"{HIERARCHY}: not a hierarchy kept by Rayograph ({' '.join(str(error).split())})") from error


def _chain(
    shell: Hierarchy,
    number: int,
    told: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    encoder: nn.Module,
    build: Build,
) -> Chain:
    tree = tree_for(shell.structure, shell.classes)
    heads = tuple(Head(**one | {"guess": tuple(one["guess"])}) for one in told["heads"])
    if len(heads) != len(tree.nodes) or not all(-1 <= head.module < len(heads) for head in heads):
        raise ValueError("other classes")
    modules = []
    for place in range(1 + max(head.module for head in heads)):
        prefix = f"{number}/{place}/"
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        outputs = max(h.first + n.width for h, n in zip(heads, tree.nodes, strict=True) if h.module == place)
        first = number == place == 0
        modules.append(_module(shell.learner, own, outputs, encoder if first else None, build))
    return Chain(tree, tuple(modules), heads, tuple(int(epoch) for epoch in told["epochs"]))


def _module(
    learner: str, own: dict[str, torch.Tensor], outputs: int, encoder: nn.Module | None, build: Build
) -> nn.Module:
    if learner == "features":
        module: nn.Module = SmallNetwork(own["trunk.weight"].shape[1], outputs)
        module.load_state_dict(own)
        return module
    module = build(outputs)
    if encoder is None:
        module.load_state_dict(own)
        return module
    classifier_of(module).load_state_dict(own)
    missing, unexpected = module.load_state_dict(encoder.state_dict(), strict=False)
    if unexpected or len(missing) != len(own):
        raise ValueError("the encoder is another one")
    return module
