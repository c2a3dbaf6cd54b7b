"""Collects the comparisons of one fixture file and says whether they hold."""

import dataclasses

import numpy as np

OUTPUT = 3e-5  # absolute, on values of order one to ten
LOSS = 2e-6  # relative
GRADIENT = (5e-5, 2e-6)  # share of the tensor's largest entry, absolute
TRAJECTORY = 6e-5  # absolute, parameters after a few AdamW updates


@dataclasses.dataclass
class Report:
    """What was compared in one file, and how far apart it was."""

    name: str
    lines: list[str] = dataclasses.field(default_factory=list)
    failed: bool = False
    worst_output: float | None = None
    worst_gradient: float | None = None

    @property
    def status(self) -> str:
        """Is "pass", "FAIL", or "unsupported" when nothing could be compared."""
        if not self.lines:
            return "unsupported"
        return "FAIL" if self.failed else "pass"

    def row(self) -> str:
        """Returns the file's line of the table."""
        errors = (
            "-" if error is None else f"{error:.2e}"
            for error in (self.worst_output, self.worst_gradient)
        )
        cells = (f"{error:>9}" for error in errors)
        return "  ".join((f"{self.name:<44}", *cells, self.status))

    def _record(self, what: str, error: float, allowed: float) -> None:
        good = error <= allowed  # False for NaN
        self.failed |= not good
        self.lines.append(
            f"{'ok  ' if good else 'FAIL'} {what}: {error:.3e} (allowed {allowed:.3e})"
        )

    def _same_shape(self, what: str, ours: np.ndarray, theirs: np.ndarray) -> bool:
        if ours.shape == theirs.shape:
            return True
        self.failed = True
        self.lines.append(f"FAIL {what}: shape {ours.shape}, expected {theirs.shape}")
        return False

    def output(
        self, what: str, ours, theirs, allowed: float = OUTPUT, *, rounding=0.0
    ) -> None:
        """Compares an array, by its worst absolute difference.

        Args:
          rounding: of each entry, what it may differ by besides.
        """
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if self._same_shape(what, ours, theirs):
            apart = np.abs(ours - theirs) - np.asarray(rounding, np.float64)
            error = float(np.maximum(apart, 0.0).max(initial=0.0))
            self.worst_output = max(error, self.worst_output or 0.0)
            self._record(what, error, allowed)

    def loss(self, what: str, ours, theirs, allowed: float = LOSS) -> None:
        """Compares a scalar, by its relative difference."""
        ours, theirs = float(ours), float(theirs)
        error = abs(ours - theirs)
        self.worst_output = max(error, self.worst_output or 0.0)
        self._record(what, error, allowed * abs(theirs))

    def exact(self, what: str, ours, theirs) -> None:
        """Compares masks, counts and indices, which must be equal."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if self._same_shape(what, ours, theirs):
            different = float((ours != theirs).sum())
            self.worst_output = max(different, self.worst_output or 0.0)
            self._record(f"{what}, entries that differ", different, 0.0)

    def gradient(self, what: str, ours, theirs) -> None:
        """Compares a gradient, relative to the largest entry of its tensor."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        if self._same_shape(what, ours, theirs):
            error = float(np.abs(ours - theirs).max(initial=0.0))
            largest = float(np.abs(theirs).max(initial=0.0))
            relative, absolute = GRADIENT
            if largest > absolute:  # below, only rounding noise is compared
                share = error / largest
                self.worst_gradient = max(share, self.worst_gradient or 0.0)
            self._record(what, error, relative * largest + absolute)
