"""Launching a kernel again without what Triton does anew at each launch.

kernel[grid](...) binds the arguments, looks at each one for what was compiled in (dtype, a
multiple of 16, 1), evaluates the heuristics and looks the kernel up: tens of microseconds, for
something that is the same at every call with tensors of the same shapes, strides, dtypes and
alignment. `Launch` does it once.
"""


class Launch:
    """A kernel with its grid and all arguments but the tensors: launch(*tensors).

    numbers: the arguments that follow the tensors; constants: the constexprs and launch options,
    by name. The first call goes through Triton, which compiles; the others launch what it found.
    They are right only for tensors like the first ones (ops.run keeps a Launch by these).
    """

    def __init__(self, kernel, grid: tuple, numbers: tuple, **constants):
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.again = None  # what launches the compiled kernel
        self.rest = ()  # the arguments after the tensors, constexprs too

    def __call__(self, *tensors) -> None:
        if self.again is not None:
            self.again(*tensors, *self.rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            names = self.kernel.arg_names
            values = dict(zip(names, (*tensors, *self.numbers))) | self.constants
            self.rest = tuple(values[name] for name in names[len(tensors) :])
            self.again = compiled[(*self.grid, 1, 1)[:3]]
