# CMake reads this after llama.cpp's own project() (CMAKE_PROJECT_llama.cpp_INCLUDE in the Makefile): llama-cpp-python
# forces the library of llama.cpp's tools into its build, which nothing of ours loads.
set(LLAMA_BUILD_COMMON OFF)
