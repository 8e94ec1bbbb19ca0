# The target `actserve_runtime`: the libraries of PyTorch. CMAKE_PREFIX_PATH has them:
# python -c "import torch; print(torch.utils.cmake_prefix_path)"
find_package(Torch REQUIRED)
add_library(actserve_runtime INTERFACE)
target_link_libraries(actserve_runtime INTERFACE ${TORCH_LIBRARIES})
