# The target `actserve_runtime`: ONNX Runtime. It is found as a CMake package, in ONNXRUNTIME_ROOT, or in the usual places.
# ONNXRUNTIME_ROOT is a folder of a release of ONNX Runtime, or any folder with the library, such as
# onnxruntime/capi of the Python package, which has no headers: src/onnx_abi.h replaces them.
set(ONNXRUNTIME_ROOT "" CACHE PATH "a folder with ONNX Runtime's library, and its headers if there are any")

add_library(actserve_runtime INTERFACE)
if(NOT ONNXRUNTIME_ROOT)
  find_package(onnxruntime CONFIG QUIET)
endif()
if(onnxruntime_FOUND)
  target_link_libraries(actserve_runtime INTERFACE onnxruntime::onnxruntime)
else()
  # A Python package has the library under its full version only: libonnxruntime.so.1.31.1.
  file(GLOB found "${ONNXRUNTIME_ROOT}/libonnxruntime.so.*" "${ONNXRUNTIME_ROOT}/lib/libonnxruntime.so.*")
  find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib lib64)
  if(NOT ONNXRUNTIME_LIBRARY AND found)
    list(GET found 0 first)
    set(ONNXRUNTIME_LIBRARY "${first}" CACHE FILEPATH "ONNX Runtime's library" FORCE)
  endif()
  if(NOT ONNXRUNTIME_LIBRARY)
    message(FATAL_ERROR "expected ONNX Runtime as a CMake package, or in -DONNXRUNTIME_ROOT=DIR; found none")
  endif()
  find_path(ONNXRUNTIME_INCLUDE onnxruntime_c_api.h HINTS ${ONNXRUNTIME_ROOT}
    PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)
  if(ONNXRUNTIME_INCLUDE)
    target_include_directories(actserve_policy SYSTEM PRIVATE ${ONNXRUNTIME_INCLUDE})
  endif()
  # Programs look for the library under the name libonnxruntime.so.1, with old versions under their full version: links
  # with these names beside them.
  foreach(file libonnxruntime.so.1 ${found})
    get_filename_component(name "${file}" NAME)
    file(CREATE_LINK "${ONNXRUNTIME_LIBRARY}" "${CMAKE_CURRENT_BINARY_DIR}/${name}" SYMBOLIC)
  endforeach()
  target_link_libraries(actserve_runtime INTERFACE "${CMAKE_CURRENT_BINARY_DIR}/libonnxruntime.so.1")
  set(CMAKE_BUILD_RPATH "$ORIGIN")
  message(STATUS "ONNX Runtime: ${ONNXRUNTIME_LIBRARY}, headers: ${ONNXRUNTIME_INCLUDE}")
endif()
