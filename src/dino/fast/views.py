"""The batched twin of MultiCrop: the views of many pictures at once, by torch operations, on any device.

It makes them of the same draws by the same steps, so each view equals the plain one to a few grey levels; what is left
is rounding, most of it OpenCV's, whose blur has weights of 8 bits. A resize and a blur are matrix products, with a
matrix of weights for the rows and one for the columns of each view; the colour changes take all views at once, in
whatever order each has them. On the way pixels are float32, and whole grey levels after each step.
"""

import torch
from torch import Tensor

from dino.data.views import CHANGES, Draw, adjust_contrast, adjust_hue, adjust_saturation
from dino.fast.sending import send

BOX, FLIP, FACTORS, TURN, GREY, SIGMA, SOLARIZE, ORDER = slice(4), 4, slice(5, 8), 8, 9, 10, 11, slice(12, 16)
WIDTH = 16
"""What stands where in the numbers of a draw."""

CHANGE = {change: number for number, change in enumerate(CHANGES)}
CUT = 0.001  # a little above 0, so that cutting leaves whole numbers what they are
LUMA = (9798 / 2**15, 19235 / 2**15, 3735 / 2**15)  # ITU-R 601 in the 15 bits that OpenCV has: exact in float32


def to_row(draw: Draw) -> tuple[float, ...]:
    """A draw as the WIDTH numbers that `multi_crop` reads."""
    *factors, turn = draw.factors
    order = (*draw.order, -1, -1, -1, -1)[:4]
    box = (draw.top, draw.left, draw.height, draw.width)
    return (*box, draw.flip, *factors, int(turn * 255) % 256, draw.gray, draw.sigma, draw.solarize, *order)


def multi_crop(images: Tensor, draws: Tensor, size: int, threshold: int) -> Tensor:
    """uint8 [B, 3, H, W], and draws [n, B, WIDTH] on the CPU -> uint8 views [n, B, 3, size, size].

    A picture may lie in the upper left corner of a larger frame: what is outside its crop is never seen. threshold: of
    solarisation. Nothing waits for the device: which views a step is for is read off the draws before they go there.
    """
    there = send(draws.flatten(0, 1), images.device)
    views = crop(images.float(), there[:, BOX].unflatten(0, draws.shape[:2]), there[:, FLIP] > 0, size)
    draws, per_view = draws.flatten(0, 1), there[:, :, None, None, None]
    views = jitter(views, per_view, draws[:, ORDER])
    if draws[:, GREY].any():
        views = torch.where(per_view[:, GREY] > 0, gray(views), views)
    if len(rows := draws[:, SIGMA].nonzero().flatten()):
        which = send(rows, images.device)
        views.index_copy_(0, which, blur(views[which], there[which, SIGMA], int(radius(draws[:, SIGMA].max()))))
    if draws[:, SOLARIZE].any():
        views = torch.where((per_view[:, SOLARIZE] > 0) & (views >= threshold), 255 - views, views)
    return views.to(torch.uint8).unflatten(0, (-1, len(images)))


# -- resize: crop_box, flip and resize ---------------------------------------------------------------------------------


def crop(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """[B, 3, H, W], boxes [n, B, 4] of top, left, height, width, flip [n B] -> [n B, 3, size, size].

    Antialiased bicubic, across first, and whole grey levels in between, as Pillow and PyTorch do it for bytes.
    """
    n, count = boxes.shape[:2]
    top, left, height, width = boxes.unbind(-1)
    down = bicubic(top, height, size, images.shape[-2])  # [n, B, size, H]
    across = bicubic(left, width, size, images.shape[-1])
    across = torch.where(flip.unflatten(0, (n, count))[:, :, None, None], across.flip(-2), across)
    wide = images.flatten(1, 2) @ across.transpose(0, 1).flatten(1, 2).mT  # [B, 3 H, n size]
    wide = wide.round_().clamp_(0, 255).unflatten(1, (3, -1)).unflatten(3, (n, size))
    wide = wide.permute(3, 0, 2, 1, 4).flatten(3, 4)  # [n, B, H, 3 size]
    views = (down @ wide).round_().clamp_(0, 255).unflatten(3, (3, size))  # [n, B, size, 3, size]
    return views.transpose(2, 3).flatten(0, 1).contiguous()


def bicubic(start: Tensor, length: Tensor, size: int, extent: int) -> Tensor:
    """[..., size, extent]: what each pixel of `extent` gives to each of `size` that show start .. start + length.

    Keys' cubic, a = -0.5, as wide as the step between two results where that is more than a pixel.
    """
    start, length = start[..., None, None], length[..., None, None]
    step = length / size
    centers = (torch.arange(size, device=start.device)[:, None] + 0.5) * step
    places = torch.arange(extent, device=start.device) - start
    x = ((places + 0.5 - centers) / step.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((places >= 0) & (places < length))
    return weights / weights.sum(-1, keepdim=True)


# -- colour ------------------------------------------------------------------------------------------------------------


def luma(views: Tensor) -> Tensor:
    """[M, 3, S, S] -> [M, 1, S, S], not rounded."""
    red, green, blue = views.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def gray(views: Tensor) -> Tensor:
    """[M, 3, S, S] -> [M, 1, S, S], the grey that stands in all three channels."""
    return luma(views).add_(0.5).floor_()


def jitter(views: Tensor, per_view: Tensor, order: Tensor) -> Tensor:
    """The colour changes of each view in its own order. per_view: draws [M, WIDTH, 1, 1, 1]; order [M, 4] on the CPU.

    Brightness, contrast and saturation all go away from a base: black, the view's mean grey, each pixel's own grey.
    """
    factors = dict(zip(CHANGES, per_view[:, FACTORS].unbind(1), strict=False))
    for slot in range(order.shape[1]):
        if (order[:, slot] < 0).all():
            continue
        which = per_view[:, ORDER][:, slot]
        factor = torch.ones_like(which)
        for change, its in factors.items():
            factor = torch.where(which == CHANGE[change], its, factor)
        own = luma(views)
        mean = own.mean((2, 3), keepdim=True).add_(0.5).floor_()
        base = torch.where(which == CHANGE[adjust_saturation], own, mean * (which == CHANGE[adjust_contrast]))
        views = torch.addcmul(base, factor, views - base).add_(CUT).floor_().clamp_(0, 255)
        if len(rows := (order[:, slot] == CHANGE[adjust_hue]).nonzero().flatten()):
            rows = send(rows, views.device)
            views.index_copy_(0, rows, hue(views[rows], per_view[rows, TURN]))
    return views


def hue(views: Tensor, turn: Tensor) -> Tensor:
    """[M, 3, S, S], turn [M, 1, 1, 1] in 256ths of the circle: there and back through hue and saturation of 8 bits."""
    red, green, blue = views.split(1, 1)
    value = views.amax(1, keepdim=True)
    spread = value - views.amin(1, keepdim=True)
    sixths = torch.where(value == green, (blue - red) + 2 * spread, (red - green) + 4 * spread)
    sixths = torch.where(value == red, green - blue, sixths)
    angle = over(sixths, spread, 256 / 6)  # -43 to 213
    angle = around(torch.where(angle < 0, angle + 256, angle) + turn, 256).mul_(6 / 255)
    share = over(spread, value, 255) / 255 * value
    planes = []
    for corner in (5, 3, 1):
        k = around(angle + corner, 6)
        planes.append(value - share * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.cat(planes, 1).round_().clamp_(0, 255)


def around(angle: Tensor, circle: int) -> Tensor:
    """An angle of less than two circles: of less than one."""
    return torch.where(angle >= circle, angle - circle, angle)


def over(part: Tensor, whole: Tensor, times: float) -> Tensor:
    """times part / whole in whole numbers; 0 of 0 is 0. By OpenCV's reciprocals of 12 bits: halves fall as they do."""
    reciprocal = (times * 2**12 / whole.clamp(min=1)).round_().int()
    return (part.int().mul_(reciprocal).add_(2**11) >> 12).float()


# -- blur --------------------------------------------------------------------------------------------------------------


def radius(sigma: Tensor) -> Tensor:
    """How far OpenCV's Gaussian reaches on bytes."""
    return (6 * sigma + 1).round().long().bitwise_or(1) // 2


def blur(views: Tensor, sigma: Tensor, widest: int) -> Tensor:
    """[M, 3, S, S], sigma [M]; the outermost pixels go on outside. widest: the largest radius, at least."""
    weights = gaussian(sigma, views.shape[-1], widest)[:, None]
    return (weights @ (views @ weights.mT)).add_(0.5).floor_().clamp_(0, 255)


def gaussian(sigma: Tensor, size: int, widest: int) -> Tensor:
    """[M, size, size]: what each of `size` pixels gives to each; those outside count as the one at the border."""
    places = torch.arange(-widest, size + widest, device=sigma.device)
    away = places - torch.arange(size, device=sigma.device)[:, None]
    sigma = sigma[:, None, None]
    weights = torch.exp(-0.5 * (away / sigma) ** 2) * (away.abs() <= radius(sigma))
    weights = weights / weights.sum(-1, keepdim=True)
    first, inner, last = weights.split((widest + 1, size - 2, widest + 1), -1) if size > 1 else (weights, None, None)
    if inner is None or last is None:
        return first.sum(-1, keepdim=True)
    return torch.cat([first.sum(-1, keepdim=True), inner, last.sum(-1, keepdim=True)], -1)
