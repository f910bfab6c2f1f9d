"""What a denoiser may say: its formula in float64, and how far rounding may take it from there.

A computation in a type of unit roundoff u knows a logit up to an error that follows from its arguments. Weights that
are known up to factors `exp(+-e)` move a mean by at most `tanh(e / 2)` times the range of what is averaged (the total
variation between two distributions whose log-ratio spans 2 e). So each result has a tolerance of its own: it is wide
only where the problem itself is ill-posed in that type. No tolerance here is fitted to what was found.
"""

from dataclasses import dataclass

import numpy as np
import torch

from golddiff.denoise import compiled as kernel
from golddiff.denoise import crops, draws, local, patches, whole, wiener

NOTHING = 60.0  # rows whose logit lies so far below the best have no weight in float64 (e^-60 < 1e-26)
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


NUMBERS = ("mean", "mean_error", "evidence", "evidence_error", "ess", "ess_factor")


@dataclass
class Reach:
    """Of one image, `(D,)` each: the exact result, and how far from it a right one may be. None: nothing is said."""

    mean: np.ndarray
    mean_error: np.ndarray
    evidence: np.ndarray | None = None
    evidence_error: np.ndarray | None = None
    ess: np.ndarray | None = None
    ess_factor: np.ndarray | None = None
    choices: np.ndarray | None = None  # any of these `(n, D)` may be the mean instead

    def holds(self, posterior, b):
        """What is wrong with image b of a posterior, in words; "" if all is well."""
        wrong = []
        away = np.abs(
            posterior.mean[b].double().numpy().ravel() - (self.mean if self.choices is None else self.choices)
        )
        off = (away if self.choices is None else away[away.max(1).argmin()]) - self.mean_error
        if not (off <= 0).all():
            i = int(np.argmax(off))
            wrong.append(f"mean[{i}] is off by {off[i] + self.mean_error[i]:.3g}, allowed {self.mean_error[i]:.3g}")
        if self.evidence is not None:
            found = posterior.log_evidence[b].double().numpy().ravel()
            off = np.abs(found - self.evidence) - self.evidence_error
            if not (off <= 0).all():
                wrong.append(f"log_evidence {found[off.argmax()]} is not {self.evidence.ravel()[off.argmax()]}")
        if self.ess is not None:
            ratio = np.abs(np.log(posterior.ess[b].double().numpy().ravel() / self.ess)) - self.ess_factor
            if not (ratio <= 0).all():
                wrong.append(f"ess is off by a factor of exp({(ratio + self.ess_factor).max():.3g})")
        return "; ".join(wrong)


def rows_of(bank):
    """The rows as the formula means them, `(N, D)` float64, by other arithmetic than the bank's."""
    pixels = bank.pixels.flatten(1).numpy().astype(np.float64)
    return pixels / 127.5 - 1 if bank.is_uint8 else pixels


def of_softmax(logits, errors, values, count, u, size):
    """The softmax-weighted mean of values `(K, P)`, by logits `(K, P)` that are known up to errors `(K, P)`; `count`:
    number of rows of which the evidence is a mean; `size`: of the numbers that make a value."""
    best = (logits - errors).max(0)
    felt = logits + errors >= best - NOTHING
    error = np.where(felt, errors, 0).max(0)
    peak = logits.max(0)
    e = np.exp(logits - peak)
    total = e.sum(0)
    weights = e / total
    mean = (weights * values).sum(0)
    high, low = np.where(felt, values, -np.inf).max(0), np.where(felt, values, np.inf).min(0)
    spread = np.tanh(np.minimum(error, 50) / 2) * (high - low)
    sums = (len(logits) + 8) * u  # of K terms, and their roundings
    evidence = peak + np.log(total) - np.log(count)
    return Reach(
        mean=mean,
        mean_error=spread + (2 * sums + 4 * u + 1e-25) * size,
        evidence=evidence,
        evidence_error=error + sums + 8 * ROUNDOFF[torch.float64] * np.abs(evidence),
        ess=1 / np.square(weights).sum(0),
        ess_factor=4 * error + 4 * sums,
    )


class Formula:
    """The formula of a denoiser for the images of one call, in one type."""

    def __init__(self, denoiser, posterior, labels, seeds):
        self.denoiser, self.posterior, self.bank = denoiser, posterior, denoiser.bank
        self.labels, self.seeds, self.x = labels, seeds, rows_of(denoiser.bank)
        self.x_t = posterior.x_t.double().flatten(1).numpy()
        self.dtype = posterior.x_t.dtype
        self.u = ROUNDOFF[self.dtype]
        self.size = max(np.abs(self.x).max(), 1.0 if self.bank.is_uint8 else 0.0)  # p / 127.5 and 1
        self.origin = self.bank.centre.double().numpy() * self.bank.scale + self.bank.offset
        noise = posterior.noise.expand(len(self.x_t))
        self.alpha, self.sigma = noise.alpha.numpy(), noise.sigma.numpy()

    def differences(self, b, rows, x_t=None, loose=0.0):
        """`(x_t - alpha x) / sigma` of some rows, `(K, D)`, and how far rounding of `Bank.query` takes it; also that of
        the subtraction in the type. `loose`: an error of `x_t` itself."""
        a, s, u = self.alpha[b], self.sigma[b], self.u
        x_t = self.x_t[b] if x_t is None else x_t
        x = self.x[rows]
        q, v = np.abs(x_t - a * self.origin) / s, a * np.abs(x - self.origin) / s
        read = 0.0 if self.bank.is_uint8 else 2 * u * a * (np.abs(x) + np.abs(self.origin)) / s
        # what was float64 all along, and `p / 127.5 - 1`
        size = np.abs(x) + np.abs(self.origin) + (1 if self.bank.is_uint8 else 0)
        tiny = 8 * ROUNDOFF[torch.float64] * (np.abs(x_t) + a * size) / s
        d = (x_t - a * x) / s
        return d, u * (q + 2 * v) + read + tiny + loose / s, u * (v + np.abs(d))

    def of(self, b):
        """The `Reach` of image b; None where the denoiser draws what the formula cannot know."""
        kinds = {
            whole.Optimal: self.whole, whole.Nearest: self.nearest, local.MaskedDenoiser: self.masked,
            patches.PatchDenoiser: self.patches, crops.CropDenoiser: self.crops, draws.Smoothed: self.smoothed,
            wiener.Wiener: self.wiener, draws.NeighbourProposals: lambda b: None,
        }  # fmt: skip
        return kinds[type(self.denoiser)](b)

    def whole(self, b, x_t=None, loose=0.0):
        support = self.posterior.support
        rows = support.rows_of(b).numpy()
        d, known, _ = self.differences(b, rows, x_t, loose)
        errors = (np.abs(d) * known + known**2).sum(1) + len(d[0]) * ROUNDOFF[torch.float64] * np.square(d).sum(1)
        if len(rows) > whole.MEASURED_AGAIN:  # by products, whose error has a bound (golden.rounding)
            q = np.linalg.norm(self.x_t[b] - self.alpha[b] * self.origin) / self.sigma[b]
            # products of bytes are of rows less 128, not less the centre
            far = np.linalg.norm(self.x - self.origin, axis=1).max() + 1.01 * len(d[0]) ** 0.5
            v = self.alpha[b] / self.sigma[b] * far
            errors = errors + 32 * self.u * v * (2 * q + v)
        logits = -np.square(d).sum(1) / 2 + support.log_q_of(b).double().numpy()
        wide = np.ones(self.x.shape[1])
        count = int(support.eligible[b])
        found = of_softmax(logits[:, None] * wide, errors[:, None] * wide, self.x[rows], count, self.u, self.size)
        found.evidence, found.evidence_error = found.evidence[:1], found.evidence_error[:1]
        found.ess, found.ess_factor = found.ess[:1], found.ess_factor[:1]
        return found

    def nearest(self, b):
        rows = (
            np.arange(len(self.x)) if self.labels[b] < 0 else (self.bank.labels == self.labels[b]).numpy().nonzero()[0]
        )
        d, known, _ = self.differences(b, rows)
        far = np.square(d).sum(1)
        errors = 2 * (np.abs(d) * known + known**2).sum(1) + 2 * len(d[0]) * ROUNDOFF[torch.float64] * far
        found = self.x[rows[np.abs(far - far.min()) <= errors + errors[far.argmin()]]]
        return Reach(found[0], np.full(len(d[0]), 4 * self.u * self.size), choices=found)

    def masked(self, b):
        support, denoiser = self.posterior.support, self.denoiser
        label = None if self.labels[b] < 0 else int(self.labels[b])
        noise = self.posterior.noise.expand(len(self.x_t))[b]
        mask = denoiser.locality.mask(noise, label).double().numpy()
        parts = Reach(*(np.zeros(len(self.origin)) for _ in range(6)))
        for tile, outputs in enumerate(support.outputs(len(self.origin))):
            rows, outputs = support.rows_of(b, tile), outputs.numpy()
            added = support.log_q_of(b, tile).double().numpy()
            own = [self._masked(b, rows.numpy(), mask[:, outputs], outputs, added)]
            if denoiser.legacy_batch:
                batches = rows.split(denoiser.legacy_batch)
                own += [self._masked(b, part.numpy(), mask[:, outputs], outputs, 0.0) for part in batches]
                for name in ("mean", "mean_error"):
                    setattr(own[0], name, sum(getattr(part, name) for part in own[1:]) / len(batches))
                own[0].ess_factor = np.full(len(outputs), np.inf)
            for name in NUMBERS:
                getattr(parts, name)[outputs] = getattr(own[0], name)
        return parts

    def _masked(self, b, rows, mask, outputs, added):
        d, known, rounded = self.differences(b, rows)
        known = known + rounded
        size = np.abs(mask)
        errors = (np.abs(d) * known + known**2) @ size
        errors += (len(d[0]) + 4) * self.u * (np.square(d) @ size)  # sums of D squares
        if kernel.WORTH == 0 and self.dtype == torch.float32:
            # whole-number sums: at most so many entries, each off by half a step, where the step is such that
            # `sqrt(entries) step / sqrt(12) / 2` is within the resolution
            errors += np.sqrt(3) * np.sqrt(size.sum(0).max()) * kernel.RESOLUTION + 2.0**-20
        logits = -np.square(d) @ mask / 2 + np.reshape(added, (-1, 1))
        # a logit is stored in the type once more
        errors += 2 * self.u * np.abs(logits)
        count = int(self.posterior.support.eligible[b])
        return of_softmax(logits, errors, self.x[rows][:, outputs], count, self.u, self.size)

    def smoothed(self, b):
        denoiser = self.denoiser
        shape, a = self.posterior.x_t.shape[1:], self.alpha[b]
        count = denoiser.draws // 2 if denoiser.antithetic else denoiser.draws
        level = int(self.posterior.noise.expand(len(self.x_t))[b].angle)
        xi = torch.randn(count, *shape, generator=draws.generator(self.seeds[b], level))
        xi = torch.cat([xi, -xi]) if denoiser.antithetic else xi
        around = self.x_t[b] + a * denoiser.kappa * xi.double().flatten(1).numpy()
        parts = [self.whole(b, x_t, 4 * self.u * (np.abs(x_t) + np.abs(self.x_t[b]))) for x_t in around]
        mean = sum(part.mean for part in parts) / len(parts)
        size = (len(parts) + 4) * self.u * self.size
        return Reach(mean, sum(part.mean_error for part in parts) / len(parts) + size)

    def crops(self, b):
        channels, height, width = self.bank.shape
        rows = self.posterior.support.rows_of(b).numpy()
        d, known, rounded = self.differences(b, rows)
        known = known + rounded
        side = self.denoiser.windows(self.posterior.noise.expand(len(self.x_t))[b])
        sides = min(side, height), min(side, width)
        errors = np.abs(d) * known + known**2 + (channels * sides[0] * sides[1] + 4) * self.u * np.square(d)
        squares, errors = (part.reshape(-1, *self.bank.shape).sum(1) for part in (np.square(d), errors))
        values = self.x[rows].reshape(-1, *self.bank.shape)
        mean, error, holders = (np.zeros(self.bank.shape) for _ in range(3))
        for y in range(height - sides[0] + 1):
            for z in range(width - sides[1] + 1):
                crop = slice(y, y + sides[0]), slice(z, z + sides[1])
                logits = -squares[:, *crop].sum((1, 2)) / 2
                inside = values[:, :, *crop].reshape(len(rows), -1)
                wide = np.ones(inside.shape[1])
                own = of_softmax(
                    logits[:, None] * wide, (errors[:, *crop].sum((1, 2)) + 2 * self.u * -logits)[:, None] * wide,
                    inside, 1, self.u, self.size,
                )  # fmt: skip
                mean[:, *crop] += own.mean.reshape(channels, *sides)
                error[:, *crop] += own.mean_error.reshape(channels, *sides)
                holders[:, *crop] += 1
        return Reach((mean / holders).ravel(), (error / holders + 8 * self.u * self.size).ravel())

    def patches(self, b):
        channels, height, width = self.bank.shape
        noise = self.posterior.noise.expand(len(self.x_t))[b]
        side, a, s = self.denoiser.windows(noise), self.alpha[b], self.sigma[b]
        if side >= min(height, width):
            self.denoiser, denoiser = self.denoiser._whole, self.denoiser
            found = self.masked(b)
            self.denoiser = denoiser
            return found
        half, borders = side // 2, self.denoiser.borders
        rows = self.posterior.support.rows_of(b).numpy()
        image = self.x_t[b].reshape(self.bank.shape) / s
        images = self.x[rows].reshape(-1, *self.bank.shape)
        pad = ((0, 0), (half, half), (half, half))
        query = np.pad(image, pad, mode="constant" if borders else "wrap")
        padded = np.pad(images, ((0, 0), *pad))
        scale, size = a / s, channels * side**2
        # the type that the scan promises to take, see patches.WORST_ROUNDING
        longest, typical = scale * np.sqrt(size), (scale + patches.TYPICAL) * np.sqrt(size)
        kept = 16 * 2.0**-23 * longest * (2 * typical + longest) < patches.WORST_ROUNDING
        u = self.u if kept else ROUNDOFF[torch.float64]
        parts = Reach(*(np.zeros(self.bank.shape) for _ in range(6)))
        inner = [(i, j) for i in range(half, height - half) for j in range(half, width - half)]
        for y in range(height):
            for z in range(width):
                cut = borders and not (half <= y < height - half and half <= z < width - half)
                rows_y = [y] if borders and not half <= y < height - half else range(half, height - half)
                rows_z = [z] if borders and not half <= z < width - half else range(half, width - half)
                places = [(i, j) for i in rows_y for j in rows_z] if cut else inner
                patch = query[:, y : y + side, z : z + side].ravel()
                others = np.concatenate(
                    [padded[:, :, i : i + side, j : j + side].reshape(len(rows), -1) for i, j in places]
                )
                centres = np.concatenate([images[:, :, i, j] for i, j in places])
                d = patch - scale * others
                norms, reach = np.square(others).sum(1) * scale**2, np.linalg.norm(others, axis=1) * scale
                products = (size + 6) * u * (2 * reach * np.linalg.norm(patch) + norms)
                products = products + 8 * ROUNDOFF[torch.float64] * (np.square(patch).sum() + norms)
                wide = np.ones(channels)
                own = of_softmax(
                    -np.square(d).sum(1)[:, None] / 2 * wide, products[:, None] * wide, centres, len(others), self.u,
                    self.size,
                )  # fmt: skip
                own.evidence_error = own.evidence_error + 2 * u * np.square(patch).sum()  # rounded first
                for name in NUMBERS:
                    getattr(parts, name)[:, y, z] = getattr(own, name)
        return Reach(*(getattr(parts, name).ravel() for name in NUMBERS))

    def wiener(self, b):
        wanted = self.labels[b] if self.denoiser.statistics == "class" else -1
        x = self.x if wanted < 0 else self.x[(self.bank.labels == wanted).numpy()]
        mu = x.mean(0)
        cov = (x - mu).T @ (x - mu) / max(len(x) - 1, 1)
        constant = np.diag(cov) <= 1e-12  # by definition, see spectrum.CONSTANT
        cov[constant], cov[:, constant] = 0, 0
        a, s = self.alpha[b], self.sigma[b]
        size = np.hypot(a, s)
        a, s, rest = a / size, s / size, (self.x_t[b] - self.alpha[b] * mu) / size
        values, vectors = np.linalg.eigh(cov)
        values = values.clip(min=0)
        mean = mu + vectors @ (a * values / (a**2 * values + s**2) * (vectors.T @ rest))
        # an error of C of some D u trace(C), in our sums or in those of the bank, moves the gain by that / sigma^2;
        # no gain is over 1 / alpha, nor over lambda / sigma^2
        noise = 16 * len(mu) * ROUNDOFF[torch.float64] * (np.trace(cov) + np.square(x).max())
        gain = min(1 / max(a, 1e-300), (values[-1] + noise) / s**2)
        error = min(a * noise / s**2, gain) * np.linalg.norm(rest)
        error += 64 * len(mu) * ROUNDOFF[torch.float64] * (self.size + gain * np.linalg.norm(rest))
        return Reach(mean, error + 2 * self.u * np.abs(mean))
