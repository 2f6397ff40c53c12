// The int8 kernels of one instruction set: compiled twice by test_tiles.py, with emulated tiles and without.
#include "cpu/linear_int8.cpp"

#define TF_CONCAT_(a, b) a##b
#define TF_CONCAT(a, b) TF_CONCAT_(a, b)

void TF_CONCAT(linear_, TF_ISA)(const tf::LinearInt8& a) { tf::TF_ISA::linear_int8(a); }
void TF_CONCAT(block_, TF_ISA)(const tf::Int8Block& a) { tf::TF_ISA::int8_block(a); }
void TF_CONCAT(product_, TF_ISA)(const tf::Int8Weight& w, const tf::Int8Rows& x, int64_t rows, int64_t panel, float* y) {
  tf::TF_ISA::int8_product(w, x, 0, rows, panel, y);
}
