"""Derive the constants of `minilpt.kernels.jit.vector.Emitter.exp2`: 2^r on [-1/2, 1/2] as a polynomial.

Least squares, reweighted towards the largest relative error until it is level. Prints the coefficients, lowest power
first, and the largest relative error of the fit in float64 and evaluated in float32.
"""

import numpy as np
from numpy.polynomial import polynomial

DEGREE, ROUNDS = 6, 80


def main() -> None:
    r = np.concatenate([np.linspace(-0.5, 0.5, 4001), 0.5 * np.cos(np.linspace(0, np.pi, 4001))])
    wanted, weight = 2.0**r, np.ones_like(r)
    for _ in range(ROUNDS):
        matrix = np.vander(r, DEGREE + 1, increasing=True) * (weight / wanted)[:, None]
        coefficients = np.linalg.lstsq(matrix, weight, rcond=None)[0]
        error = np.abs(polynomial.polyval(r, coefficients) / wanted - 1)
        weight *= 0.3 + error / error.max()
        weight /= weight.max()
    narrow = r.astype(np.float32)
    found = polynomial.polyval(narrow, coefficients.astype(np.float32)).astype(np.float64)
    print(
        "largest relative error", error.max(), "in float32", np.abs(found / 2.0 ** narrow.astype(np.float64) - 1).max()
    )
    print(*(f"{value!r}" for value in coefficients.tolist()), sep="\n")


if __name__ == "__main__":
    main()
