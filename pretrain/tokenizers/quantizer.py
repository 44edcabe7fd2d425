"""A codebook of unit vectors that follows what is assigned to it (BEiT v2, norm_ema_quantizer.py)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from halfseen.config import ConfigError, at_least, between, positive
from halfseen.data.hashing import uniform

CHUNK = 8192  # tokens compared with the whole codebook at once: 256 MiB with 8192 codes
DEAD = 0.01  # a code used less than this share of the average is called dead


@dataclass
class QuantizerConfig:
    """The codebook. It has no gradient: it moves towards the mean of the tokens that chose each code."""

    codes: int = 8192  # entries of the codebook
    width: int = 32  # channels of an entry
    decay: float = 0.99  # share of an entry that stays at each update
    commitment: float = 1.0  # weight of the pull of tokens towards their code
    start_images: int = 64  # images of the run from whose tokens k-means makes the first codebook; 0: random
    start_rounds: int = 10  # rounds of that k-means
    revive: int = 0  # dead codes that are set to a token of the batch at each update, at most; 0: none

    def check(self, key: str) -> None:
        """Ranges."""
        for name in ("codes", "width", "start_rounds"):
            positive(f"{key}.{name}", getattr(self, name))
        for name in ("commitment", "start_images", "revive"):
            at_least(f"{key}.{name}", getattr(self, name), 0)
        between(f"{key}.decay", self.decay, 0.0, 1.0)
        if self.revive > self.codes:
            raise ConfigError(f"{key}.revive", self.revive, f"is more than {self.codes} codes", "e.g. 64")


class Quantizer(nn.Module):
    """Tokens to the nearest code and back, with a straight-through gradient.

    Saved: codebook [K, C] of unit rows, and usage [K], the average number of tokens per update that chose each code.
    A forward in training only counts; ``stepped`` moves the codebook, once per update from all micro-batches of all
    ranks, so that it does not depend on how a batch is split and is equal everywhere.
    """

    codebook: Tensor
    usage: Tensor
    counts: Tensor
    sums: Tensor
    used: Tensor
    spare_keys: Tensor
    spares: Tensor

    def __init__(self, cfg: QuantizerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_buffer("codebook", F.normalize(torch.randn(cfg.codes, cfg.width), dim=1))
        self.register_buffer("usage", torch.ones(cfg.codes))  # until it is known, every code counts as used
        # Of the update under way; not saved, since they are empty between two updates.
        self.register_buffer("counts", torch.zeros(cfg.codes), persistent=False)
        self.register_buffer("sums", torch.zeros(cfg.codes, cfg.width), persistent=False)
        self.register_buffer("spare_keys", torch.full((cfg.revive,), torch.inf), persistent=False)
        self.register_buffer("spares", torch.zeros(cfg.revive, cfg.width), persistent=False)
        self.register_buffer("used", torch.zeros(()), persistent=False)  # share of codes chosen in the last update

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, N, C] -> (code vectors float32 [B, N, C], codes int64 [B, N], commitment loss).

        positions int64 [B]: whose tokens these are; needed where dead codes are revived.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            unit = F.normalize(tokens.float(), dim=-1)
            codes = self.nearest(unit)
            found = F.embedding(codes, self.codebook)
            commitment = self.cfg.commitment * F.mse_loss(unit, found)
            if self.training and torch.is_grad_enabled():
                self.count(unit.detach(), codes, positions)
            return unit + (found - unit).detach(), codes, commitment

    @torch.no_grad()
    def nearest(self, unit: Tensor) -> Tensor:
        """The code of each unit vector: [..., C] float32 -> int64 [...]."""
        # Both are unit vectors, so the nearest is the one of largest product. In bf16 several would often share it.
        with torch.autocast(unit.device.type, enabled=False):
            parts = [(part @ self.codebook.T).argmax(1) for part in unit.reshape(-1, unit.shape[-1]).split(CHUNK)]
        return torch.cat(parts).view(unit.shape[:-1])

    @torch.no_grad()
    def count(self, unit: Tensor, codes: Tensor, positions: Tensor | None) -> None:
        """Add unit vectors [B, N, C] and their codes [B, N] to the update under way."""
        flat = codes.flatten()
        self.counts.index_add_(0, flat, torch.ones_like(flat, dtype=self.counts.dtype))
        self.sums.index_add_(0, flat, unit.flatten(0, 1))
        if self.cfg.revive:
            if positions is None:
                raise ValueError("reviving dead codes needs the samples' positions")
            # Those of smallest hash: a choice that does not depend on how a batch is split.
            keys = uniform(0, positions, codes.shape[1], "revive").flatten()
            self._keep_spares(torch.cat([self.spare_keys, keys]), torch.cat([self.spares, unit.flatten(0, 1)]))

    def _keep_spares(self, keys: Tensor, tokens: Tensor) -> None:
        smallest, index = keys.topk(self.cfg.revive, largest=False)
        self.spare_keys.copy_(smallest)
        self.spares.copy_(tokens[index])

    @torch.no_grad()
    def stepped(self, skipped: Tensor) -> None:
        """Move the codebook by what was counted since the last call, unless skipped holds 1. Collective.

        With counts n and sums s over all ranks: E <- unit(decay E + (1 - decay) unit(s / n)), codes without a token
        as they were. Waits for nothing.
        """
        cfg = self.cfg
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._gather()
        empty = (self.counts == 0)[:, None]
        moved = F.normalize(torch.lerp(F.normalize(self.sums, dim=1), self.codebook, cfg.decay), dim=1)
        codebook = torch.where(empty, self.codebook, moved)
        usage = torch.lerp(self.counts, self.usage, cfg.decay)
        if cfg.revive:
            codebook, usage = self._revived(codebook, usage)
        keep = skipped > 0
        self.codebook.copy_(torch.where(keep, self.codebook, codebook))
        self.usage.copy_(torch.where(keep, self.usage, usage))
        self.used.copy_((~empty).float().mean())
        self.counts.zero_()
        self.sums.zero_()
        self.spare_keys.fill_(torch.inf)

    def _gather(self) -> None:
        """Counts, sums and spare tokens of all ranks, in one message each."""
        both = torch.cat([self.counts[:, None], self.sums], dim=1)
        dist.all_reduce(both)
        self.counts.copy_(both[:, 0])
        self.sums.copy_(both[:, 1:])
        if self.cfg.revive:
            own = torch.cat([self.spare_keys[:, None], self.spares], dim=1)
            every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(every, own)
            rows = torch.cat(every)
            self._keep_spares(rows[:, 0], rows[:, 1:])

    def _revived(self, codebook: Tensor, usage: Tensor) -> tuple[Tensor, Tensor]:
        """The least used codes, where they are dead, set to spare tokens and counted as of average use."""
        average = usage.mean()
        least, index = usage.topk(self.cfg.revive, largest=False)
        revived = (least < DEAD * average) & self.spare_keys.isfinite()
        rows = torch.where(revived[:, None], self.spares, codebook[index])
        return codebook.index_copy(0, index, rows), usage.index_copy(0, index, torch.where(revived, average, least))

    @property
    def untouched(self) -> bool:
        """Whether no update and no loaded weights have told yet how codes are used. Waits for the device."""
        return bool((self.usage == 1).all())

    @torch.no_grad()
    def scalars(self) -> dict[str, Tensor]:
        """How the codebook is used: share of codes in the last update; over about 1 / (1 - decay) updates their
        perplexity and the share of dead ones."""
        share = self.usage / self.usage.sum().clamp(min=1e-20)
        entropy = -torch.special.xlogy(share, share).sum()
        dead = (self.usage <= DEAD * self.usage.mean()).float().mean()
        return {"codes_used": self.used.clone(), "code_perplexity": entropy.exp(), "dead_codes": dead}

    @torch.no_grad()
    def start(self, tokens: Tensor, seed: int) -> None:
        """Make the codebook by k-means of tokens [..., C]."""
        unit = F.normalize(tokens.detach().float().flatten(0, -2), dim=1)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(unit), generator=generator)
        if len(unit) < self.cfg.codes:
            order = torch.randint(len(unit), (self.cfg.codes,), generator=generator)
        first = unit[order[: self.cfg.codes].to(unit.device)]
        self.codebook.copy_(kmeans(unit, first, self.cfg.start_rounds)[0])


def kmeans(samples: Tensor, means: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """k-means by cosine: samples [M, C], first means [K, C] -> means [K, C] of length 1, and counts int64 [K].

    The counts are of the assignment that made the last means. A mean without samples stays where it was.
    """
    counts = torch.zeros(len(means), dtype=torch.int64, device=means.device)
    for _ in range(rounds):
        nearest = torch.cat([(part @ means.T).argmax(1) for part in samples.split(CHUNK)])
        counts = torch.zeros_like(counts).index_add_(0, nearest, torch.ones_like(nearest))
        sums = torch.zeros_like(means).index_add_(0, nearest, samples)
        means = torch.where((counts == 0)[:, None], means, F.normalize(sums, dim=1))
    return means, counts
