# Unpacks what the tree carries as archives: models/<name>.tar.xz into models/<name>/ of the build folder, and the oracle
# checkpoints into oracles/. An archive is unpacked anew only when it is newer than the mark that its last unpacking left.

# `folder` is replaced by what `archive`, unpacked in `into`, puts there.
function(unpack archive into folder)
  set(mark ${folder}/.unpacked)
  get_filename_component(name ${archive} NAME)
  add_custom_command(
    OUTPUT ${mark}
    DEPENDS ${archive}
    COMMAND ${CMAKE_COMMAND} -E rm -rf ${folder}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${into}
    COMMAND ${CMAKE_COMMAND} -E chdir ${into} ${CMAKE_COMMAND} -E tar xf ${archive}
    COMMAND ${CMAKE_COMMAND} -E touch ${mark}
    COMMENT "Unpacking ${name}"
    VERBATIM)
  set_property(GLOBAL APPEND PROPERTY VERICACHE_UNPACKED ${mark})
endfunction()

set(VERICACHE_MODELS ${CMAKE_BINARY_DIR}/models)
set(VERICACHE_ORACLES ${CMAKE_BINARY_DIR}/oracles)

file(GLOB model_archives CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/models/*.tar.xz)
foreach(archive ${model_archives})
  string(REGEX REPLACE ".*/(.*)\\.tar\\.xz$" "\\1" name ${archive})
  unpack(${archive} ${VERICACHE_MODELS} ${VERICACHE_MODELS}/${name})
endforeach()
unpack(${CMAKE_SOURCE_DIR}/tests/data/oracles/tiny-checkpoints.tar.xz ${VERICACHE_ORACLES} ${VERICACHE_ORACLES})

get_property(unpacked GLOBAL PROPERTY VERICACHE_UNPACKED)
add_custom_target(unpacked ALL DEPENDS ${unpacked})
