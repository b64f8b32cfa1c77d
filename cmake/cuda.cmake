# The CUDA half of the backend room: src/backend/cuda/*.cu and *.cc, for Hopper (sm_90a).
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/src/backend/cuda/*.cu ${CMAKE_SOURCE_DIR}/src/backend/cuda/*.cc)
if(NOT cuda_sources)
  message(STATUS "src/backend/cuda holds no code: this preset builds the CPU engine alone")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES 90a-real)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# nvcc has C++20 since 12.0; Debian 12's CMake does not know that yet.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()

# As in C++, no multiply-add is fused unless it is written so.
target_compile_options(vericache_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Werror=all-warnings -Xcompiler=-Wall,-Wextra>)
target_sources(vericache_backend PRIVATE ${cuda_sources})
set_target_properties(vericache_backend PROPERTIES
  CUDA_ARCHITECTURES 90a-real CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF)
target_link_libraries(vericache_backend PUBLIC CUDA::cudart_static CUDA::cublasLt)
