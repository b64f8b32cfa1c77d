# The CUDA half of the backend room, src/backend/cuda/*.cu and *.cc, and its benchmarks: bench/cuda/*_bench.cu of
# kernels, *_bench.cc of whole steps of a model. Its tests, tests/backend/cuda/*_test.*, are made where the other tests are.
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/backend/cuda/*.cu ${CMAKE_SOURCE_DIR}/src/backend/cuda/*.cc)
if(NOT cuda_sources)
  message(STATUS "src/backend/cuda holds no code: this preset builds the CPU engine alone")
  set(VERICACHE_CUDA OFF)
  return()
endif()

# Hopper with its own instructions. Others, such as 80-real, compile too.
set(VERICACHE_CUDA_ARCHITECTURES 90a-real CACHE STRING "GPU architectures to build kernels for")
set(CMAKE_CUDA_ARCHITECTURES ${VERICACHE_CUDA_ARCHITECTURES})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_FLAGS_RELEASE "-O2")
find_package(CUDAToolkit REQUIRED)

# nvcc has C++20 since 12.0; Debian 12's CMake does not know that yet.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()

# As in C++, no multiply-add is fused unless it is written so.
target_compile_options(vericache_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Werror=all-warnings -Xcompiler=-Wall,-Wextra,-ffp-contract=off>)
target_sources(vericache_backend PRIVATE ${cuda_sources})
set_source_files_properties(${CMAKE_SOURCE_DIR}/src/backend/factory.cc PROPERTIES COMPILE_DEFINITIONS VERICACHE_CUDA)
set_target_properties(vericache_backend PROPERTIES
  CUDA_ARCHITECTURES "${VERICACHE_CUDA_ARCHITECTURES}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
target_link_libraries(vericache_backend PUBLIC CUDA::cudart_static CUDA::cublasLt)

file(GLOB cuda_benches CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/bench/cuda/*_bench.c[cu])
foreach(source ${cuda_benches})
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE vericache_model)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench/cuda)
endforeach()
