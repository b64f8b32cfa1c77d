# VERICACHE_PORTABLE: binaries that need glibc and libm of the machine they run on, and CUDA's libcublasLt, nothing else.
# What Debian ships as archives is linked as such, fmt is compiled in, of Highway one function is needed.
option(VERICACHE_PORTABLE "Binaries that run on machines without this one's libraries" OFF)

set(VERICACHE_TEXT_OUTPUT fmt::fmt)
if(VERICACHE_PORTABLE)
  set(VERICACHE_TEXT_OUTPUT fmt::fmt-header-only)
  foreach(package PCRE2:pcre2-8 XXHASH:xxhash UTF8PROC:utf8proc HIREDIS:hiredis)
    string(REPLACE ":" ";" package ${package})
    list(GET package 0 target)
    list(GET package 1 name)
    find_library(${target}_ARCHIVE lib${name}.a REQUIRED)
    set_target_properties(PkgConfig::${target} PROPERTIES
      INTERFACE_LINK_LIBRARIES ${${target}_ARCHIVE} INTERFACE_COMPILE_DEFINITIONS $<$<STREQUAL:${target},PCRE2>:PCRE2_STATIC>)
  endforeach()
  add_library(supported_targets STATIC ${CMAKE_SOURCE_DIR}/cmake/portable/supported_targets.cc)
  set_target_properties(PkgConfig::HWY PROPERTIES INTERFACE_LINK_LIBRARIES supported_targets)
  add_link_options(-static-libstdc++ -static-libgcc -Wl,--as-needed)
  set(CMAKE_INSTALL_RPATH /usr/local/cuda/lib64)
endif()

# Called last: `tarball` packs the program, the tests and the benchmarks of the GPU that this build has.
function(add_tarball)
  if(NOT VERICACHE_PORTABLE)
    return()
  endif()
  set(programs "")
  foreach(folder ${CMAKE_SOURCE_DIR} ${CMAKE_SOURCE_DIR}/tests)
    get_property(targets DIRECTORY ${folder} PROPERTY BUILDSYSTEM_TARGETS)
    foreach(target ${targets})
      get_target_property(type ${target} TYPE)
      if(type STREQUAL EXECUTABLE AND target MATCHES "^(vericache|test_.*|.*_bench)$" AND NOT target MATCHES "_long$")
        list(APPEND programs ${target})
      endif()
    endforeach()
  endforeach()
  install(TARGETS ${programs} RUNTIME DESTINATION .)
  install(FILES ${CMAKE_SOURCE_DIR}/README.md ${CMAKE_SOURCE_DIR}/LICENSE DESTINATION .)
  set(name vericache-${PROJECT_VERSION}-${CMAKE_SYSTEM_PROCESSOR})
  add_custom_target(tarball
    COMMAND ${CMAKE_COMMAND} -E rm -rf stage
    COMMAND ${CMAKE_COMMAND} --install ${CMAKE_BINARY_DIR} --prefix stage/${name} --strip
    COMMAND ${CMAKE_COMMAND} -E chdir stage ${CMAKE_COMMAND} -E tar czf ${CMAKE_BINARY_DIR}/${name}.tar.gz ${name}
    COMMAND ${CMAKE_COMMAND} -E echo "${CMAKE_BINARY_DIR}/${name}.tar.gz"
    WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
    DEPENDS ${programs}
    VERBATIM)
endfunction()
