# A toolchain file: builds for aarch64 with Debian's cross-compiler (g++-aarch64-linux-gnu). With qemu-user, ctest runs
# the golden samples there, too.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

find_program(QEMU_AARCH64 qemu-aarch64)
if(QEMU_AARCH64)
  # ONNX Runtime reads the features of the processor in /proc/cpuinfo. Older versions of qemu show the host's there; a
  # file of that name in the folder after -L replaces it.
  set(root "${CMAKE_BINARY_DIR}/aarch64")
  cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
  math(EXPR last "${cores} - 1")
  set(processors "")
  foreach(core RANGE ${last})
    string(APPEND processors "processor\t: ${core}\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid\n"
      "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n")
  endforeach()
  file(WRITE "${root}/proc/cpuinfo" "${processors}")
  file(CREATE_LINK /usr/aarch64-linux-gnu/lib "${root}/lib" SYMBOLIC)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${QEMU_AARCH64};-L;${root}")
endif()
