"""Derive the constants of `minilpt.kernels.elementwise.gelu`: erfc(z) = t P(t) exp(-z^2), t = 1 / (1 + 0.3 z).

Least squares on z in [0, 10], reweighted towards the largest relative error until it is level (needs scipy).
Prints the coefficients, lowest power first, and the largest relative error of the fit in float64.
"""

import numpy as np
from numpy.polynomial import polynomial
from scipy.special import erfcx

DEGREE, SLOPE, ROUNDS = 8, 0.3, 60


def main() -> None:
    chebyshev = 5 + 5 * np.cos(np.linspace(0, np.pi, 4001))
    z = np.concatenate([np.linspace(0, 10, 4001), chebyshev])
    t = 1 / (1 + SLOPE * z)
    wanted = erfcx(z) / t
    weight = np.ones_like(z)
    for _ in range(ROUNDS):
        matrix = np.vander(t, DEGREE + 1, increasing=True) * (weight / wanted)[:, None]
        coefficients = np.linalg.lstsq(matrix, weight, rcond=None)[0]
        error = np.abs(polynomial.polyval(t, coefficients) / wanted - 1)
        weight *= 0.3 + error / error.max()
        weight /= weight.max()
    print("largest relative error", error.max())
    print(*(f"{value!r}" for value in coefficients.tolist()), sep="\n")


if __name__ == "__main__":
    main()
