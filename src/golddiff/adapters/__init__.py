"""golddiff's denoisers in the clothes of other libraries. Each module needs its library, so import the one you want:

golddiff.adapters.diffusers: `GoldDiffPipeline`, `GoldDiffUNet` (extra `diffusers`)
golddiff.adapters.deepinv: `GoldDiffDenoiser` (extra `deepinv`)
golddiff.adapters.edm: `EDMDenoiser`, the convention `D(x, sigma)`; no extra
"""
