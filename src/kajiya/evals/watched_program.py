"""Runs the Python program on its standard input in a child, and kills all that it has started before ending as it did.

`kajiya.evals.sandbox` starts it as a script of its own, which is the parent of what is left behind (`adopt_orphans`): a process
that leaves the program's session stays its descendant. It imports what the interpreter has anyway, for programs are many and short.
"""


def _program() -> object:
    """In the child the compiled program; the parent never returns."""
    import _signal
    import posix
    import sys

    def is_child(entry: str) -> bool:
        try:
            with open(f"/proc/{entry}/stat", "rb") as handle:
                return int(handle.read().rpartition(b")")[2].split()[1]) == posix.getpid()
        except OSError:
            return False

    def sweep() -> None:
        """Kill children until there is none; those of a killed one come after it."""
        try:
            posix.waitpid(-1, posix.WNOHANG)
            while True:
                for entry in filter(str.isdigit, posix.listdir("/proc")):
                    if is_child(entry):
                        posix.kill(int(entry), _signal.SIGKILL)
                posix.waitpid(-1, 0)
        except ChildProcessError:
            return

    def stop(*_: object) -> None:
        sweep()
        posix._exit(1)

    def watch(child: int) -> None:
        _signal.signal(_signal.SIGTERM, stop)
        _, status = posix.waitpid(child, 0)
        sweep()
        if posix.WIFSIGNALED(status):
            number = posix.WTERMSIG(status)
            if number != _signal.SIGKILL:
                _signal.signal(number, _signal.SIG_DFL)
            posix.kill(posix.getpid(), number)
        posix._exit(posix.WEXITSTATUS(status))

    source = sys.stdin.buffer.read()
    child = posix.fork()
    if child:
        watch(child)
    sys.argv = ["-"]
    for name in ("_program", "__file__"):
        del globals()[name]  # The program finds its own names alone.
    return compile(source, "<stdin>", "exec")


if __name__ == "__main__":
    exec(_program())  # type: ignore[arg-type]
