r"""emdiff: learn the distribution p(x) behind corrupted observations obs = A x + n, from the observations alone.

Symbols, the same in every file:

| symbol | meaning | shape |
|---|---|---|
| `x` | clean datum | (B, *S) |
| `y` | measurements y_m = x + sigma_m eps_m, m = 1..M | (B, M, *S) |
| `v` | velocity of a walk | like y |
| `obs` | observation A x + n | (B, *O) |
| `A`, `At` | observer and its adjoint | |
| `cov_obs` | covariance of n | acts on (B, *O) |
| `sigma` | noise levels of the measurements | (M,), or (B, M, ...) where they differ by datum or entry |
| `ybar` | precision-weighted mean of the measurements | (B, *S) |
| `tau` | effective noise (sum_m sigma_m^-2)^(-1/2) | (B or 1, *S or ones) |
| `nu` | the M outputs of a denoiser | like y |
| `xhat` | Bayes estimator E[x | y] | (B, *S) |
| `V` | posterior covariance V[x | y] | acts on (B, *S) |
| `delta`, `gamma`, `u` | step, friction per unit time, inverse mass of a walk | |
| `k` | EM iteration | |
| `f`, `h` | energy, -log p(y) up to a constant; its metaencoder | (B,) |
| `c` | noise coordinate log(1 + 1/tau^2)/2 | like tau |

Layers, each importing only from those before it: observers; maths (measurement, linalg, denoise, mixture, guidance, langevin,
gaussian); learning (nn, mdae, mem, muvb, poisson, scale, observations, start, training); em; cli. tests/test_layers.py has the whole list.
"""

__version__ = "0.1.0"
