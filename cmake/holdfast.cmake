# What every room's CMakeLists.txt uses: compiler settings, dependencies, and three functions,
#   holdfast_library(NAME SOURCES... [DEPS ...])   a static library `holdfast_NAME`
#   holdfast_test(NAME SOURCES... [DEPS ...] [LABELS ...] [TIMEOUT s])   a GoogleTest program
#   holdfast_program(NAME SOURCES... [DEPS ...])   an executable
# and holdfast_finish(), which fails the configuration if a *_test.cc is in no target.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()

option(HOLDFAST_WERROR "Warnings are errors" ON)
set(HOLDFAST_SANITIZE "" CACHE STRING "Value of -fsanitize= for everything, or empty")

find_program(HOLDFAST_CCACHE ccache)
if(HOLDFAST_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${HOLDFAST_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${HOLDFAST_CCACHE})
endif()

add_library(holdfast_options INTERFACE)
target_include_directories(holdfast_options INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(holdfast_options INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor
  -Wold-style-cast -Wcast-qual -Wimplicit-fallthrough -Wunused-result -Werror=unused-result
  -fno-omit-frame-pointer -msse4.2 -mpclmul)
if(HOLDFAST_WERROR)
  target_compile_options(holdfast_options INTERFACE -Werror)
endif()
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  # libstdc++ 12's std::stable_sort calls what libstdc++ 12 deprecates.
  target_compile_options(holdfast_options INTERFACE -Wthread-safety -Wno-deprecated-declarations)
else()
  # g++ 12 sees null dereferences and overflows in inlined libstdc++ code that are not there.
  target_compile_options(holdfast_options INTERFACE -Wno-restrict -Wno-stringop-overflow
    -Wno-maybe-uninitialized -Wno-array-bounds)
endif()
set(HOLDFAST_TEST_OPTIONS "" CACHE STRING "Further compile options of tests (the sanitizer presets: -O0)")
if(HOLDFAST_SANITIZE)
  add_compile_options(-fsanitize=${HOLDFAST_SANITIZE} -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${HOLDFAST_SANITIZE})
  if(HOLDFAST_SANITIZE MATCHES "undefined" AND CMAKE_CXX_COMPILER_ID MATCHES Clang)
    # It asks the kernel through a pipe, and so fails where a test takes all descriptors away.
    add_compile_options(-fno-sanitize=vptr)
    # What libFuzzer follows (tests/fuzz). Not its -fsanitize=fuzzer-no-link: that calls a function for each comparison,
    # which makes a loop three times as slow for all other tests.
    add_compile_options(-fsanitize-coverage=inline-8bit-counters,pc-table)
  endif()
endif()

# Two thirds of the time of compiling a file go into the headers that all of them include. The
# sanitizer presets precompile those; the others do not, so a file that forgets an include fails.
option(HOLDFAST_PRECOMPILE_HEADERS "Precompile common headers (clang only)" OFF)

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(absl REQUIRED)
find_package(GTest REQUIRED)
pkg_check_modules(liburing REQUIRED IMPORTED_TARGET liburing)
pkg_check_modules(zstd REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(libcrypto REQUIRED IMPORTED_TARGET libcrypto)
find_path(HOLDFAST_ISAL_INCLUDE isa-l.h REQUIRED)
find_library(HOLDFAST_ISAL_LIBRARY isal REQUIRED)
find_path(HOLDFAST_HDF5_INCLUDE hdf5.h PATHS /usr/include/hdf5/serial REQUIRED NO_DEFAULT_PATH)
find_library(HOLDFAST_HDF5_LIBRARY hdf5 PATHS /usr/lib/${CMAKE_LIBRARY_ARCHITECTURE}/hdf5/serial
  REQUIRED NO_DEFAULT_PATH)
find_path(HOLDFAST_TOMLPP_INCLUDE toml++/toml.h REQUIRED)
# Optional: tests compare our own declarations with these headers.
find_path(HOLDFAST_CUDA_INCLUDE cuda.h PATHS /usr/local/cuda/include)
find_path(HOLDFAST_NCCL_INCLUDE nccl.h)

add_library(holdfast_isal INTERFACE)
target_include_directories(holdfast_isal SYSTEM INTERFACE ${HOLDFAST_ISAL_INCLUDE})
target_link_libraries(holdfast_isal INTERFACE ${HOLDFAST_ISAL_LIBRARY})
add_library(holdfast_hdf5 INTERFACE)
target_include_directories(holdfast_hdf5 SYSTEM INTERFACE ${HOLDFAST_HDF5_INCLUDE})
target_link_libraries(holdfast_hdf5 INTERFACE ${HOLDFAST_HDF5_LIBRARY})

if(HOLDFAST_PRECOMPILE_HEADERS)
  # One target each for the flags of libraries and of tests; all others reuse theirs.
  set(common_headers <algorithm> <array> <atomic> <cstdint> <functional> <map> <memory> <optional>
    <set> <span> <string> <string_view> <unordered_map> <utility> <vector> <absl/status/status.h>
    <absl/status/statusor.h> <absl/strings/str_cat.h> <absl/strings/str_format.h>)
  file(WRITE ${CMAKE_BINARY_DIR}/precompiled.cc "int main() { return 0; }\n")
  add_library(holdfast_precompiled_library STATIC ${CMAKE_BINARY_DIR}/precompiled.cc)
  add_executable(holdfast_precompiled_test ${CMAKE_BINARY_DIR}/precompiled.cc)
  target_compile_options(holdfast_precompiled_test PRIVATE ${HOLDFAST_TEST_OPTIONS})
  target_link_libraries(holdfast_precompiled_test PRIVATE GTest::gmock GTest::gtest)
  target_precompile_headers(holdfast_precompiled_library PRIVATE ${common_headers})
  target_precompile_headers(holdfast_precompiled_test PRIVATE ${common_headers} <gmock/gmock.h>
    <gtest/gtest.h>)
  foreach(target IN ITEMS holdfast_precompiled_library holdfast_precompiled_test)
    target_link_libraries(${target} PRIVATE holdfast_options)
    target_compile_options(${target} PRIVATE "SHELL:-Xclang -fno-pch-timestamp")
  endforeach()
endif()

# `like`: library or test.
function(holdfast_precompile target like)
  if(HOLDFAST_PRECOMPILE_HEADERS)
    target_compile_options(${target} PRIVATE "SHELL:-Xclang -fno-pch-timestamp")
    target_precompile_headers(${target} REUSE_FROM holdfast_precompiled_${like})
  endif()
endfunction()

function(holdfast_library name)
  cmake_parse_arguments(ARG "" "" "DEPS" ${ARGN})
  add_library(holdfast_${name} STATIC ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(holdfast_${name} PUBLIC ${ARG_DEPS} PRIVATE holdfast_options)
  target_include_directories(holdfast_${name} PUBLIC ${PROJECT_SOURCE_DIR})
  holdfast_precompile(holdfast_${name} library)
endfunction()

function(holdfast_program name)
  cmake_parse_arguments(ARG "" "" "DEPS" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} holdfast_options)
endfunction()

# Every *_test.cc that is in a target, for holdfast_finish().
define_property(GLOBAL PROPERTY HOLDFAST_TEST_SOURCES)

function(holdfast_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "DEPS;LABELS" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} GTest::gmock GTest::gtest GTest::gtest_main
    holdfast_options)
  target_compile_options(${name} PRIVATE ${HOLDFAST_TEST_OPTIONS})
  holdfast_precompile(${name} test)
  foreach(source IN LISTS ARG_UNPARSED_ARGUMENTS)
    get_filename_component(path ${source} ABSOLUTE)
    set_property(GLOBAL APPEND PROPERTY HOLDFAST_TEST_SOURCES ${path})
  endforeach()
  # Nothing in these rooms has a thread: ThreadSanitizer has nothing to see there. Nor does a program link with it that
  # replaces operator new, as it replaces that too.
  if(HOLDFAST_SANITIZE STREQUAL "thread" AND (ARG_LABELS MATCHES "^(base|converter|format|monitor)"
     OR "holdfast_allocation_meter" IN_LIST ARG_DEPS))
    set_target_properties(${name} PROPERTIES EXCLUDE_FROM_ALL ON)
    return()
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)  # longer than what any test waits for, on a machine with ten others, too
  endif()
  if(HOLDFAST_SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 3")
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()

function(holdfast_finish)
  file(GLOB_RECURSE on_disk ${PROJECT_SOURCE_DIR}/*_test.cc)
  get_property(in_targets GLOBAL PROPERTY HOLDFAST_TEST_SOURCES)
  foreach(path IN LISTS on_disk)
    if(path MATCHES "^${PROJECT_SOURCE_DIR}/build/")
      continue()
    endif()
    if(NOT path IN_LIST in_targets)
      message(FATAL_ERROR "${path} is in no target: a test that is not built cannot fail")
    endif()
  endforeach()
  holdfast_summary()
endfunction()

# Says what is built, with what.
function(holdfast_summary)
  get_property(tests GLOBAL PROPERTY HOLDFAST_TEST_SOURCES)
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  list(LENGTH tests test_count)
  message(STATUS "Holdfast ${PROJECT_VERSION}: libholdfast, holdfastd, holdfast, tiny_lm, ${test_count} test files")
  message(STATUS "  compiler    ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}, ${CMAKE_BUILD_TYPE}")
  message(STATUS "  sanitizers  ${HOLDFAST_SANITIZE}")
  message(STATUS "  ccache      ${HOLDFAST_CCACHE}")
  message(STATUS "  CUDA        ${HOLDFAST_CUDA_INCLUDE} (only to check our declarations)")
  message(STATUS "  NCCL        ${HOLDFAST_NCCL_INCLUDE} (nothing uses it yet)")
endfunction()
