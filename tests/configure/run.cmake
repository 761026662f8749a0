# A *_test.cc in no target makes the configuration fail, and says which: a project with cmake/holdfast.cmake
# is configured with such a file, and once more without it. Variables: SOURCE (of the repository), WORK,
# GENERATOR, MAKE_PROGRAM, CXX, CC.
foreach(variable IN ITEMS SOURCE WORK GENERATOR MAKE_PROGRAM CXX CC)
  if(NOT DEFINED ${variable})
    message(FATAL_ERROR "${variable} is not given")
  endif()
endforeach()

function(configure)
  execute_process(COMMAND ${CMAKE_COMMAND} -S ${WORK}/source -B ${WORK}/build -G ${GENERATOR}
    -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_C_COMPILER=${CC}
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  set(result ${result} PARENT_SCOPE)
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
file(WRITE ${WORK}/source/CMakeLists.txt "
cmake_minimum_required(VERSION 3.25)
project(small VERSION 1.0 LANGUAGES C CXX)
list(APPEND CMAKE_MODULE_PATH ${SOURCE}/cmake)
include(holdfast)
enable_testing()
holdfast_test(known_test room/known_test.cc)
holdfast_finish()
")
file(WRITE ${WORK}/source/room/known_test.cc "")
configure()
if(NOT result EQUAL 0)
  message(FATAL_ERROR "without a stray test: failed with ${result}:\n${output}")
endif()
file(WRITE ${WORK}/source/room/stray_test.cc "")
configure()
# Not for a later configuration of the repository to find.
file(REMOVE_RECURSE ${WORK}/source)
if(result EQUAL 0)
  message(FATAL_ERROR "a test in no target was accepted:\n${output}")
endif()
string(REGEX REPLACE "[ \n]+" " " line "${output}")
if(NOT line MATCHES "room/stray_test.cc is in no target" OR line MATCHES "known_test.cc is in no")
  message(FATAL_ERROR "expected stray_test.cc to be named, found:\n${output}")
endif()
