"""C++ of the project's own: how it is built and cached, and the vector types that all of it is written in."""
