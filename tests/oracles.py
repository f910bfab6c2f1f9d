"""Slow and plain: the formulas as loops in float64, to compare everything else with."""

import math

import numpy as np


def posterior(logits):
    """Weights, log-mean-exp and effective number of a list of logits."""
    peak = max(logits)
    total = sum(math.exp(v - peak) for v in logits)
    weights = [math.exp(v - peak) / total for v in logits]
    return weights, peak + math.log(total) - math.log(len(logits)), 1 / sum(w * w for w in weights)


def optimal(x_t, rows, alpha, sigma):
    """Mean `(D,)`, log evidence and ess of one image `(D,)` over rows `(N, D)`."""
    logits = [-sum((a - alpha * b) ** 2 for a, b in zip(x_t, row, strict=True)) / (2 * sigma**2) for row in rows]
    weights, evidence, ess = posterior(logits)
    return sum(w * row for w, row in zip(weights, rows, strict=True)), evidence, ess


def masked(x_t, rows, mask, alpha, sigma):
    """Mean, log evidence and ess of each output pixel, through a mask M[n, m]."""
    size = len(x_t)
    out = np.zeros((3, size))
    for m in range(size):
        logits = [
            -sum(mask[n, m] * (x_t[n] - alpha * row[n]) ** 2 for n in range(size)) / (2 * sigma**2) for row in rows
        ]
        weights, evidence, ess = posterior(logits)
        out[:, m] = sum(w * row[m] for w, row in zip(weights, rows, strict=True)), evidence, ess
    return out


def per_batch(x_t, rows, mask, alpha, sigma, batch):
    """The published estimator: the mean of the means of batches of rows."""
    means = [masked(x_t, rows[i : i + batch], mask, alpha, sigma)[0] for i in range(0, len(rows), batch)]
    return sum(means) / len(means)


def covariance(rows):
    mean = sum(rows) / len(rows)
    return mean, sum(np.outer(r - mean, r - mean) for r in rows) / max(len(rows) - 1, 1)


def wiener(x_t, rows, alpha, sigma):
    """Mean and log density of one image under the Gaussian of the rows."""
    mean, cov = covariance(rows)
    total = alpha**2 * cov + sigma**2 * np.eye(len(mean))
    rest = np.linalg.solve(total, x_t - alpha * mean)
    density = -(x_t - alpha * mean) @ rest / 2 - np.linalg.slogdet(2 * math.pi * total)[1] / 2
    return mean + alpha * cov @ rest, density


def pca_weights(rows, alpha, sigma):
    """W of PCA-locality."""
    _, cov = covariance(rows)
    lam, u = np.linalg.eigh(cov)
    return u @ np.diag(alpha**2 * lam / (sigma**2 + alpha**2 * lam)) @ u.T


def stable_mask(rows, alpha, sigma, threshold, rule):
    """The stable rules, entry by entry."""
    w, size = pca_weights(rows, alpha, sigma), rows.shape[1]
    varies = [rows[:, n].std() > 1e-6 for n in range(size)]
    mask = np.zeros((size, size), dtype=bool)
    for n in range(size):
        for m in range(size):
            both = varies[n] and varies[m]
            scale = w[m, m] if rule == "output" else math.sqrt(w[n, n] * w[m, m])
            mask[n, m] = n == m or (both and abs(w[n, m]) >= threshold * scale)
    return mask


def published_mask(rows, alpha, sigma, threshold):
    w = pca_weights(rows, alpha, sigma)
    for n in range(len(w)):
        if abs(w[n, n]) < 1e-6:
            w[n, n] = 1.0
    ratio = np.array([[w[n, m] / w[n, n] for m in range(len(w))] for n in range(len(w))])
    return np.abs(ratio) >= threshold * np.abs(ratio).max()


def nearest(x_t, rows, alpha, count):
    """Indices of the nearest rows."""
    distances = [sum((a - alpha * b) ** 2 for a, b in zip(x_t, row, strict=True)) for row in rows]
    return sorted(range(len(rows)), key=lambda i: distances[i])[:count]


def pooled(image, cells_h, cells_w):
    """Means of blocks whose borders are whole pixels, times the root of their size; image `(C, H, W)`."""
    c, h, w = image.shape
    out = []
    for channel in range(c):
        for i in range(cells_h):
            for j in range(cells_w):
                block = [
                    image[channel, y, x]
                    for y in range(h) for x in range(w)
                    if y * cells_h // h == i and x * cells_w // w == j
                ]  # fmt: skip
                out.append(sum(block) / math.sqrt(len(block)))
    return np.array(out)
