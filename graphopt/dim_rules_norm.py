"""Operators that look at all of an axis: reductions, normalisations, pooling. The axis stays; the others are free."""

from __future__ import annotations

from graphopt.dim_labels import ONE, is_one
from graphopt.dim_rules import PinError, Result, Site, broadcast, rule
from graphopt.dim_rules_linear import spatial

REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
POOLS = "AveragePool LpPool MaxPool"
GLOBAL_POOLS = "GlobalAveragePool GlobalLpPool GlobalMaxPool"


@rule(*REDUCTIONS.split())
def reduction(site: Site) -> Result:
    """The named axes, or all."""
    x, axes = site.axes(), site.ints("axes", 1)
    if axes is None and site.has(1):
        raise PinError("the axes to reduce are not known")
    if not axes:
        axes = [] if site.attr("noop_with_empty_axes") else list(range(len(x)))
    gone, keep = {a % len(x) for a in axes}, site.attr("keepdims") != 0
    pin = site.pin_statistics if site.op == "ReduceMean" and keep and gone == {len(x) - 1} else site.pin
    for axis in gone:
        pin(x[axis], f"{site.node.op} over this axis")
    return [[ONE if i in gone else labels for i, labels in enumerate(x) if keep or i not in gone]]


@rule("ArgMax", "ArgMin")
def position(site: Site) -> Result:
    """Positions on an axis."""
    x, axis = site.axes(), int(site.attr("axis") or 0) % len(site.axes())
    site.pin(x[axis], f"{site.node.op} gives positions on this axis")
    keep = site.attr("keepdims") != 0
    return [[ONE if i == axis else labels for i, labels in enumerate(x) if keep or i != axis]]


@rule("TopK")
def top(site: Site) -> Result:
    """The largest of an axis, and their positions."""
    x, axis = site.axes(), int(site.attr("axis")) % len(site.axes())
    site.pin(x[axis], "TopK ranks this axis")
    shape = site.out_shape()
    y = [site.pinned(shape[i], "TopK ranks this axis") if i == axis else labels for i, labels in enumerate(x)]
    return [y] * len(site.node.outputs)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(site: Site) -> Result:
    """Over one axis; before opset 13 over it and all that follow."""
    x, axis = site.axes(), int(site.attr("axis"))
    axis %= len(x)
    for labels in x[axis:] if site.opset < 13 else [x[axis]]:
        site.pin(labels, f"{site.node.op} over this axis")
    return [x]


@rule("CumSum", "CumProd")
def cumulative(site: Site) -> Result:
    """Along one axis, which is an input."""
    x, axis = site.axes(), site.ints("axis", 1)
    for labels in x if axis is None else [x[axis[0]]]:
        site.pin(labels, f"{site.node.op} along this axis")
    return [x]


@rule("LayerNormalization", "RMSNormalization", "com.microsoft::SimplifiedLayerNormalization", "SimplifiedLayerNormalization")
def layer_normalization(site: Site) -> Result:
    """Over `axis` and all that follow, with scale and bias for each of their elements; the rest are statistics."""
    x, axis = site.axes(), int(-1 if site.attr("axis") is None else site.attr("axis"))
    axis %= len(x)
    pin = site.pin_statistics if axis == len(x) - 1 else site.pin
    for labels in x[axis:]:
        pin(labels, f"{site.node.op} over this axis")
    for index in site.given()[1:]:
        for labels, met in zip(site.axes(index)[::-1], x[::-1], strict=False):
            site.tie(labels, met)
    statistics = [*x[:axis], *[ONE] * (len(x) - axis)]
    return [x, statistics, statistics][: len(site.node.outputs)]


@rule("com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
def skip_layer_normalization(site: Site) -> Result:
    """Over the last axis of a sum."""
    x = site.axes()
    site.pin_statistics(x[-1], f"{site.node.op} over this axis")
    for index in site.given():
        broadcast(site, [x, site.axes(index)])
    statistics = [*x[:-1], ONE]
    return [x, statistics, statistics, x][: len(site.node.outputs)]


@rule("com.microsoft::EmbedLayerNormalization")
def embed_layer_normalization(site: Site) -> Result:
    """Rows of two or three tables, picked and added, over their last axis."""
    ids, hidden = site.axes(), site.axes(2)[1]
    site.pin_statistics(hidden, f"{site.node.op} over this axis")
    for index in site.given():
        *rows, last = site.axes(index)
        site.pin_axes(rows, f"{site.node.op} addresses positions")
        if index in range(2, 7):  # the tables, scale and bias
            site.tie(last, hidden)
        else:
            site.pin(last, "positions")
    y = [*ids, hidden]
    return [y, [ids[0]], y][: len(site.node.outputs)]


@rule("InstanceNormalization")
def instance_normalization(site: Site) -> Result:
    """Each channel over its own pixels, with a scale and a bias."""
    x = site.axes()
    site.pin_axes(x[2:], "InstanceNormalization over this axis")
    for index in (1, 2):
        site.tie(site.axes(index)[0], x[1])
    return [x]


@rule("MeanVarianceNormalization")
def mean_variance_normalization(site: Site) -> Result:
    """Over the named axes; all but the second by default."""
    x = site.axes()
    for axis in site.attr("axes") or (0, 2, 3):
        site.pin(x[axis], "MeanVarianceNormalization over this axis")
    return [x]


@rule("LpNormalization")
def lp_normalization(site: Site) -> Result:
    """Over one axis."""
    x = site.axes()
    site.pin(x[int(site.attr("axis"))], "LpNormalization over this axis")
    return [x]


@rule("LRN", "GroupNormalization")
def across_channels(site: Site) -> Result:
    """Neighbouring channels, or groups of them, and for groups all pixels."""
    x = site.axes()
    site.pin(x[1], f"{site.node.op} across channels")
    if site.node.op == "GroupNormalization":
        site.pin_axes(x[2:], f"{site.node.op} over this axis")
    for index in site.given()[1:]:
        site.pin_axes(site.axes(index), f"{site.node.op} across channels")
    return [x]


@rule(*POOLS.split())
def pool(site: Site) -> Result:
    """Windows over the axes from the third."""
    x = site.axes()
    if len(site.node.outputs) > 1 and site.node.outputs[1].name:
        raise PinError("MaxPool gives positions in the whole tensor")
    return [[*x[:2], *spatial(site, x)]]


@rule(*GLOBAL_POOLS.split())
def global_pool(site: Site) -> Result:
    """One window over the axes from the third."""
    x = site.axes()
    site.pin_axes([labels for labels in x[2:] if not is_one(labels)], f"{site.node.op} over this axis")
    return [[*x[:2], *[ONE] * len(x[2:])]]
