"""The batched gather-matmul in plain torch operations: two small products a segment, no padding, no copied weights."""

from __future__ import annotations

import torch

from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup


def add_lora(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
    """y[rows] += scale * (x[rows] A^T) B for every segment of the plan and every site of the group that it touches.

    x: [T, d_in], y: [T, d_out of the group], both of the sites' dtype, or any where that is int8. y is written in place
    and returned; base rows are untouched. Each adapter costs its own rank, whatever the others' ranks are.
    """
    for site in group.sites:
        part = y[:, site.columns]
        for segment in plan.segments:
            if site.index not in segment.sites:
                continue
            a_t, b = site.rows(segment.first, segment.last)
            rows = segment.rows
            if site.scales is not None:  # in float32: steps up to 127 would leave float16's range
                scale, b_scale = (part[segment.first : segment.last].flatten() for part in site.scales)
                shrunk = torch.mm(x[rows].float(), a_t.float()) * (scale * b_scale)
                part[rows] = (part[rows] + segment.scale * torch.mm(shrunk, b.float())).to(y.dtype)
                continue
            shrunk = torch.mm(x[rows], a_t)
            if isinstance(rows, slice):
                part[rows].addmm_(shrunk, b, alpha=segment.scale)
            else:
                part.index_add_(0, rows, torch.mm(shrunk, b), alpha=segment.scale)
    return y
