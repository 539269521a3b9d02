"""Runs the Python program on its standard input in a child, and kills all that it has started before ending as it did.

`kajiya.evals.sandbox` starts it as a script of its own, which is the parent of what is left behind (`adopt_orphans`): a process
that leaves the program's session stays its descendant. It imports what the interpreter has anyway, for programs are many and short.

Its argument is the number of a socket that holds a word: what gives it back has come to the end of the program.
"""


def _run() -> None:
    """Run the program in a child; the parent ends as the child did."""
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

    def settrace(function: object) -> None:
        """As `sys.settrace`, for what turns it off alone (doctest does)."""
        if function is not None:
            raise RuntimeError("a program is not traced here: a trace function can skip its tests")

    def refuse_tracing(event: str, _: object) -> None:
        if event in ("sys.settrace", "sys.monitoring.register_callback"):
            raise RuntimeError

    child = posix.fork()
    if child:
        watch(child)
    program = compile(sys.stdin.buffer.read().decode(), "<stdin>", "exec")
    line, names = int(sys.argv[1]), sys.modules["__main__"].__dict__
    sys.argv = ["-"]
    for name in ("_run", "__file__"):
        del names[name]  # The program finds its own names alone.
    sys.settrace = settrace
    sys.addaudithook(refuse_tracing)
    # In one expression: while the program runs, the word lies among its unfinished terms, which no frame, variable or object of
    # Python's shows; and what is left to be done then looks up no name that the program could have given another meaning.
    posix.write(line, posix.read(line, 16) + (exec(program, names) or b""))  # type: ignore[func-returns-value]


if __name__ == "__main__":
    _run()
