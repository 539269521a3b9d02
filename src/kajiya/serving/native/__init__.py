"""The decoder step in C++: built at first use, loaded with ctypes."""
