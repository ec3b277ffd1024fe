"""An emulator of NKI, the kernel language of Trainium and Inferentia, in numpy; for the subset that quire's kernels use.

It is worth what it refuses: every documented constraint is a rule with a name (rules.py), and a program that breaks one
raises NkiError with the numbers, the remedy and the kernel's line. It also counts what a kernel costs by the documented numbers.
Passing it is no proof for hardware: timing, hazards between engines and rounding inside TensorE are not modelled.

How one kernel source gets its `nl` and `nisa` on both the emulator and AWS's `nki` package. Three designs were weighed:

1. The emulator registers itself in `sys.modules` as `nki` where the package is absent. The kernels are plain NKI. But whoever
   else asks "is nki installed?" is then lied to for the rest of the process, and where it is installed the emulator cannot run.
2. `nl` and `nisa` are parameters of every kernel and of every helper, or names of a module that chooses at import. Explicit, but
   official front ends up to 0.6 parse a kernel's source and take its parameters for tensors or constants, never modules; and a choice made
   at import is a global one, so that both can again not run in one process.
3. Kernel modules are plain NKI, `import nki.language as nl`, that nobody imports by accident. On a device they are imported as
   any module; for the emulator `load_emulated` runs the same file in a second module whose imports of `nki` it answers itself.

Taken is the third: the source is what AWS's compiler and its readers expect, nothing global is touched, and both run side by side,
which is what comparing them needs. Its price is twenty lines of loader. Kernels are not decorated: the caller puts `nki.jit` or
`simulate` around them.
"""

from quire.kernels.nki.loading import load_emulated, official_nki
from quire.kernels.nki.simulate import Simulation, simulate

__all__ = ["Simulation", "load_emulated", "official_nki", "simulate"]
