"""The specification of what adapters do to rows: every backend is compared with this."""

from __future__ import annotations

import torch

from weft.kernels.bottleneck import NON_LINEARITIES, BottleneckWeights
from weft.kernels.plan import Plan
from weft.kernels.site import SiteGroup


def add_lora(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, plan: Plan) -> torch.Tensor:
    """y[t] += sum over (page p, scale s) of token t:  s * B[p]^T (A[p] x[t]),  token by token, page by page.

    x: [T, d_in], y: [T, d_out of the group] of any float dtype, each site in its own columns; rows of either may lie
    apart. The scales of int8 rows of A and B go into s. Sums run in float64 and are rounded once. y is
    written in place and returned.
    """
    for site in group.sites:
        part = y[:, site.columns]
        delta = torch.zeros(part.shape, dtype=torch.float64, device=y.device)
        touched: set[int] = set()
        for segment in plan.segments:
            if site.index not in segment.sites:
                continue
            for t in torch.arange(plan.num_tokens)[segment.rows].tolist():
                touched.add(t)
                for page in range(segment.first, segment.last):
                    shrunk = site.a[page].double() @ x[t].double()
                    if site.scales is not None:
                        shrunk *= site.scales[0][page].double() * site.scales[1][page].double()
                    delta[t] += segment.scale * (site.b[page].double().t() @ shrunk)
        for t in touched:
            part[t] = (part[t].double() + delta[t]).to(y.dtype)
    return y


def bottleneck(y: torch.Tensor, residual: torch.Tensor, weights: BottleneckWeights) -> torch.Tensor:
    """y + up act(down x + down_bias) + up_bias, float64, where x is y, the residual stream before it, or their sum.

    y, residual: [T, d] of any float dtype.
    """
    down, down_bias, up, up_bias = (tensor.to(y.device).double() for tensor in weights.tensors.values())
    x = weights.reads.of(y.double(), residual.double())
    return y.double() + NON_LINEARITIES[weights.non_linearity](x @ down.t() + down_bias) @ up.t() + up_bias
