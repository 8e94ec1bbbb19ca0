"""The bundle for C++: a CMake project with a library, the program `policy`, and tests."""
