# Installs hook library and agent into an empty tree, and builds and runs strangers' programs on it:
# with find_package, and with pkg-config alone. The programs open a job, so the library must find the
# installed agent. Variables: BUILD, SOURCE (this folder), WORK, GENERATOR,
# MAKE_PROGRAM, CXX, CC.
foreach(variable IN ITEMS BUILD SOURCE WORK GENERATOR MAKE_PROGRAM CXX CC)
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
foreach(component IN ITEMS hook agent)
  run(${CMAKE_COMMAND} --install ${BUILD} --component ${component} --prefix ${WORK}/first)
endforeach()
# A relocated tree must serve as well.
file(RENAME ${WORK}/first ${WORK}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE} -B ${WORK}/build -G ${GENERATOR}
  -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_PREFIX_PATH=${WORK}/prefix
  -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_C_COMPILER=${CC} -DCMAKE_CXX_STANDARD=17)
run(${CMAKE_COMMAND} --build ${WORK}/build)

# Whatever the tester's environment says: no other agent, and nothing outside this folder.
foreach(variable IN ITEMS HOLDFASTD HOLDFAST_SOCKET HOLDFAST_PRIVATE HOLDFAST_CONFIG)
  unset(ENV{${variable}})
endforeach()
set(ENV{PATH} /usr/bin:/bin)
file(MAKE_DIRECTORY ${WORK}/run)
file(CHMOD ${WORK}/run PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
set(ENV{HOLDFAST_RUNTIME_DIR} ${WORK}/run)
set(ENV{HOLDFAST_ROOT} ${WORK}/root)
set(ENV{XDG_STATE_HOME} ${WORK}/state)
set(ENV{HOLDFAST_HOST_MEMORY} 64MiB)
set(ENV{HOLDFAST_LINGER} 50ms)
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
