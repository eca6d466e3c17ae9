"""Small networks in the styles that are exported in the wild; `MODELS` says how each is called and exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, WIDTH, HIDDEN, MLP = 3, 4, 12, 20
TOKENS = {"x": {0: "batch", 1: "seq"}}
IMAGES = {"x": {0: "batch"}}


@dataclass(frozen=True)
class Export:
    """`axes`: the dynamic axes of each input. `ways`: torchscript, dynamo<opset>, fused, fused_dynamo."""

    make: Callable[[], nn.Module]
    example: tuple[Tensor, ...]
    axes: Mapping[str, Mapping[int, str]]
    ways: tuple[str, ...]
    fusion: str = "bert"
    heads: int = HEADS
    hidden: int = HIDDEN


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1) @ v


class Bert(nn.Module):
    """As in transformers: view(new_shape), mask from tokens, dense + GELU; the sizes are read at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(40, HIDDEN), nn.Embedding(32, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(BertLayer() for _ in range(2))
        self.classifier = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(x.size(1), device=x.device)[None]
        h = self.norm(self.words(x) + self.positions(places))
        bias = (1.0 - mask[:, None, None, :].to(h.dtype)) * -10000.0
        for layer in self.layers:
            h = layer(h, bias)
        return self.classifier(h[:, 0])


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.dense, self.norm1 = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down, self.norm2 = nn.Linear(HIDDEN, MLP), nn.Linear(MLP, HIDDEN), nn.LayerNorm(HIDDEN)

    def split(self, x: Tensor) -> Tensor:
        return x.view((*x.size()[:-1], HEADS, WIDTH)).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        c = _softmax_attention(self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x)), bias)
        c = c.permute(0, 2, 1, 3).contiguous()
        x = self.norm1(self.dense(c.view((*c.size()[:-2], HIDDEN))) + x)
        return self.norm2(self.down(F.gelu(self.up(x))) + x)


class Vit(nn.Module):
    """As in timm: packed qkv by reshape(B, N, 3, H, D), class token, position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 4, 4)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, HIDDEN)), nn.Parameter(torch.zeros(1, 5, HIDDEN))
        self.blocks = nn.ModuleList(VitBlock() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat((self.token.expand(h.shape[0], -1, -1), h), dim=1) + self.places
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class VitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, MLP), nn.Linear(MLP, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Gpt2(nn.Module):
    """As in transformers: one addmm for q, k and v, split; causal mask cut from a buffer; tied output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(40, HIDDEN), nn.Embedding(32, HIDDEN)
        self.blocks = nn.ModuleList(Gpt2Block() for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.positions(torch.arange(x.size(-1), device=x.device)[None])
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Conv1D(nn.Module):
    """transformers' linear layer with a transposed weight."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias, self.n_out = nn.Parameter(torch.zeros(n_in, n_out)), nn.Parameter(torch.zeros(n_out)), n_out

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view((*x.size()[:-1], self.n_out))


class Gpt2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn, self.proj, self.up, self.down = (
            Conv1D(a, b) for a, b in ((HIDDEN, 3 * HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, MLP), (MLP, HIDDEN))
        )
        self.register_buffer("bias", torch.tril(torch.ones(32, 32, dtype=torch.bool)).view(1, 1, 32, 32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.view((*part.size()[:-1], HEADS, WIDTH)).permute(0, 2, 1, 3)
            for part in self.attn(self.norm1(x)).split(HIDDEN, dim=2)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH)
        seen = self.bias[:, :, k.size(-2) - q.size(-2) : k.size(-2), : k.size(-2)]
        scores = torch.where(seen, scores, torch.full([], torch.finfo(scores.dtype).min))
        c = (torch.softmax(scores, dim=-1) @ v).permute(0, 2, 1, 3).contiguous()
        x = x + self.proj(c.view((*c.size()[:-2], HIDDEN)))
        h = self.up(self.norm2(x))
        return x + self.down(0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0)))))


class RmsNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Llama(nn.Module):
    """As in transformers: rotary positions computed at run time, two key heads for four query heads, SwiGLU."""

    def __init__(self, eager: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, 4, 2) / 4), persistent=False)
        self.blocks = nn.ModuleList(LlamaBlock(eager) for _ in range(2))
        self.norm, self.head = RmsNorm(16), nn.Linear(16, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        places = torch.arange(x.size(1), device=x.device).float()[None, :, None].expand(x.size(0), -1, 1)
        angles = places * self.frequencies[None, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        for block in self.blocks:
            h = block(h, angles.cos(), angles.sin())
        return self.head(self.norm(h))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def _repeated(x: Tensor, times: int) -> Tensor:
    b, heads, length, width = x.shape
    return x[:, :, None].expand(b, heads, times, length, width).reshape(b, heads * times, length, width)


class LlamaBlock(nn.Module):
    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager, self.norm1, self.norm2 = eager, RmsNorm(16), RmsNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, n, bias=False) for n in (16, 8, 8, 16))
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((16, MLP), (16, MLP), (MLP, 16)))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm1(x)
        q, k, v = (layer(h).view(b, s, -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        if self.eager:
            k, v = _repeated(k, 2), _repeated(v, 2)
            mask = torch.triu(torch.full((s, s), float("-inf")), diagonal=1)
            y = _softmax_attention(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Swin(nn.Module):
    """Two blocks of a shifted-window transformer: windows by view and permute, a bias for each head and pair of places, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, HIDDEN, 2, 2)
        self.blocks = nn.ModuleList(SwinBlock(shift) for shift in (0, 1))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean((1, 2)))


class SwinBlock(nn.Module):
    def __init__(self, shift: int, window: int = 2, size: int = 4) -> None:
        super().__init__()
        self.shift, self.window, self.size = shift, window, size
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, MLP), nn.Linear(MLP, HIDDEN)
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, HEADS))
        places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1], persistent=False)
        regions = torch.zeros(1, size, size, 1)
        if shift:
            for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                for j, columns in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                    regions[:, rows, columns] = 3 * i + j
        flat = self.windows(regions).squeeze(-1)
        self.register_buffer("mask", torch.where(flat[:, None] != flat[:, :, None], -100.0, 0.0), persistent=False)

    def windows(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // self.window, self.window, w // self.window, self.window, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window**2, c)

    def image(self, x: Tensor) -> Tensor:
        n = self.size // self.window
        b = x.shape[0] // (n * n)
        x = x.view(b, n, n, self.window, self.window, -1).permute(0, 1, 3, 2, 4, 5).contiguous()
        return x.view(b, self.size, self.size, -1)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * WIDTH**-0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.shift:
            count = self.mask.shape[0]
            scores = scores.view(b // count, count, HEADS, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, HEADS, n, n)
        return self.proj((torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        h = torch.roll(h, shifts=(-self.shift, -self.shift), dims=(1, 2)) if self.shift else h
        h = self.image(self.attend(self.windows(h)))
        h = torch.roll(h, shifts=(self.shift, self.shift), dims=(1, 2)) if self.shift else h
        x = x + h
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Seq2Seq(nn.Module):
    """torch.nn's own layers, with cross attention: heads merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(HIDDEN, HEADS, MLP, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(HIDDEN, HEADS, MLP, batch_first=True)
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.head(self.decoder(x2, self.encoder(x)))


class T5(nn.Module):
    """A decoder layer as in T5: relative position bias from an embedding of bucketed distances, no scaling, gated GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias = nn.Embedding(40, HIDDEN), nn.Embedding(9, HEADS)
        self.norm1, self.norm2 = RmsNorm(HIDDEN), RmsNorm(HIDDEN)
        self.q, self.k, self.v, self.o = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))
        self.wi0, self.wi1, self.wo = (nn.Linear(a, b, bias=False) for a, b in ((HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)))

    def forward(self, x: Tensor) -> Tensor:
        b, s = x.shape
        h = self.words(x)
        n = self.norm1(h)
        q, k, v = (layer(n).view(b, -1, HEADS, WIDTH).transpose(1, 2) for layer in (self.q, self.k, self.v))
        places = torch.arange(s, device=x.device)
        apart = (places[None, :] - places[:, None]).clamp(-4, 4) + 4
        scores = q @ k.transpose(3, 2) + self.bias(apart).permute(2, 0, 1).unsqueeze(0)
        c = (torch.softmax(scores.float(), dim=-1).type_as(scores) @ v).transpose(1, 2).contiguous().view(b, -1, HIDDEN)
        h = h + self.o(c)
        n = self.norm2(h)
        return (h + self.wo(F.gelu(self.wi0(n), approximate="tanh") * self.wi1(n))).mean(1)


class Moe(nn.Module):
    """Every expert computed for every token and weighted by a softmax gate: einsum over stacked weights."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, experts)
        self.up, self.down = nn.Parameter(torch.zeros(experts, HIDDEN, MLP)), nn.Parameter(torch.zeros(experts, MLP, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(torch.einsum("bsh,ehm->besm", x, self.up))
        y = torch.einsum("besm,emh->besh", h, self.down)
        return torch.einsum("besh,bse->bsh", y, torch.softmax(self.gate(x), dim=-1))


def _words(rows: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))


MODELS = {
    "bert": Export(
        Bert,
        (_words(), torch.ones(2, 5, dtype=torch.long)),
        {"x": {0: "batch", 1: "seq"}, "xmask": {0: "batch", 1: "seq"}},
        ("torchscript", "dynamo18", "dynamo23", "fused", "fused_dynamo"),
    ),
    "vit": Export(Vit, (torch.randn(2, 3, 8, 8),), IMAGES, ("torchscript", "dynamo18", "dynamo23", "fused"), "vit"),
    "gpt2": Export(Gpt2, (_words(),), TOKENS, ("torchscript", "dynamo18", "fused"), "gpt2"),
    "llama": Export(Llama, (_words(),), TOKENS, ("torchscript", "dynamo18", "fused_dynamo"), "gpt2", 4, 16),
    "llama_sdpa": Export(lambda: Llama(eager=False), (_words(),), TOKENS, ("dynamo20", "dynamo23")),
    "swin": Export(Swin, (torch.randn(2, 3, 8, 8),), IMAGES, ("torchscript", "dynamo18")),
    "seq2seq": Export(
        Seq2Seq,
        (torch.randn(2, 5, HIDDEN), torch.randn(2, 4, HIDDEN)),
        {"x": {0: "batch", 1: "seq"}, "x2": {0: "batch", 1: "seq2"}},
        ("torchscript", "dynamo18"),
    ),
    "t5": Export(T5, (_words(),), TOKENS, ("torchscript", "dynamo18")),
    "moe": Export(Moe, (torch.randn(2, 5, HIDDEN),), TOKENS, ("torchscript", "dynamo18")),
}
