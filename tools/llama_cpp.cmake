# CMake reads this after llama.cpp's own project() (CMAKE_PROJECT_llama.cpp_INCLUDE in the Makefile): llama-cpp-python
# adds the library of llama.cpp's tools to its build, but tinyllama does not use this library.
set(LLAMA_BUILD_COMMON OFF)
