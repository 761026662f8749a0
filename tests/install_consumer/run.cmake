# Installs the hook library into an empty tree, and builds and runs strangers' programs on it: with
# find_package, and with pkg-config alone. Variables: BUILD, SOURCE (this folder), WORK, CXX, CC.
foreach(variable IN ITEMS BUILD SOURCE WORK CXX CC)
  if(NOT DEFINED ${variable})
    message(FATAL_ERROR "${variable} is not given")
  endif()
endforeach()

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output
    ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\nfailed with ${result}:\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --component hook --prefix ${WORK}/first)
# A relocated tree must serve as well.
file(RENAME ${WORK}/first ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE} -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/prefix
  -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_STANDARD=17)
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/consumer)
message(STATUS "find_package: ${output}")
run(${WORK}/build/consumer_c)

file(GLOB_RECURSE pc_file ${WORK}/prefix/*holdfast.pc)
get_filename_component(pc_directory "${pc_file}" DIRECTORY)
find_program(PKG_CONFIG pkg-config REQUIRED)
set(ENV{PKG_CONFIG_PATH} ${pc_directory})
run(${PKG_CONFIG} --cflags --libs holdfast)
separate_arguments(flags UNIX_COMMAND "${output}")
run(${CXX} -std=c++17 ${SOURCE}/consumer.cc -o ${WORK}/with_pkg_config ${flags})
run(${PKG_CONFIG} --variable=libdir holdfast)
string(STRIP "${output}" library_directory)
set(ENV{LD_LIBRARY_PATH} ${library_directory})
run(${WORK}/with_pkg_config)
message(STATUS "pkg-config: ${output}")
