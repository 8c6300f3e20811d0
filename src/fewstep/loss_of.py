"""A model and its loss as one module, from batch to loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fewstep.normalisation import Policy, Statistics, batch_norms, normalised
from fewstep.task import Batch, Joint, is_pair


class LossOf(nn.Module):
    """One forward pass from batch to loss, so that one functional call swaps the parameters of all parts."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any], inner_loss: Callable[..., Any] | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.inner_loss = inner_loss
        self.statistics, self.layers = Statistics(), batch_norms(model)
        self.normalisation: Policy | None = None

    def forward(self, batch: Batch, query: bool) -> tuple[Any, Any]:
        loss = self.loss if query or self.inner_loss is None else self.inner_loss
        if isinstance(batch, Joint):
            before, x = len(batch.before), torch.cat([batch.before, batch.x])
            with normalised(self.normalisation, self.statistics, self.layers, before, len(x)):
                prediction = self.model(x)[before:]
                return loss(prediction, batch.y), prediction
        with normalised(self.normalisation, self.statistics, self.layers):
            if not is_pair(batch):
                result: Any = loss(self.model, batch)
                return result if isinstance(result, tuple) else (result, None)
            x, y = batch
            prediction = self.model(x)
            return loss(prediction, y), prediction
